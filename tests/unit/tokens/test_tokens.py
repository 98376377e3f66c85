"""Bearer tokens: what is accepted, and every way to be refused (RFC 7519, RFC 8725; G8)."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey
from joserfc.jws import JWSRegistry

from hsm_pool import limits
from hsm_pool.errors import Unauthenticated
from hsm_pool.net import interceptors
from hsm_pool.net.authorization import Caller, Kind
from hsm_pool.settings import TokenIssuerSettings, TokenSettings
from hsm_pool.tokens.issuer import Issuer, object_id
from hsm_pool.tokens.issuer_keys import IssuerKeys
from hsm_pool.tokens.verification import TokenVerifier
from security_domain.encoding import encode
from tests.unit.provisioning.test_settings import _IDENTITY

NOW = 1_800_000_000.0
ISSUER, AUDIENCE = "https://login.example/tenant/v2.0", "https://managedhsm.azure.net"
OID, APPID, GROUP = (str(uuid.UUID(int=0xABCDEF << 96 | number)) for number in (1, 2, 3))
"""With letters: their case must not matter."""
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "aud": AUDIENCE,
    "iat": NOW - 10,
    "nbf": NOW - 10,
    "exp": NOW + 3600,
    "oid": OID,
    "groups": [GROUP],
}
RSA = RSAKey.generate_key(2048, {"kid": "rsa"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Place:
    """A key set in a file, and a verifier of its issuer."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "keys.json"
        self.clock = Clock()
        self.publish(RSA, EC)
        settings = TokenSettings("127.0.0.1:1", ISSUER, AUDIENCE, str(self.file), "")
        self.verifier = TokenVerifier(settings, IssuerKeys(str(self.file), "", self.clock), lambda: NOW)

    def publish(self, *keys: RSAKey | ECKey, **more: Any) -> None:
        self.file.write_text(json.dumps({"keys": [{**key.as_dict(private=False), **more} for key in keys]}))

    def refusal(self, token: str) -> str:
        with pytest.raises(Unauthenticated) as refused:
            self.verifier.verify(token)
        return refused.value.message


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def signed(
    key: Any = RSA, algorithm: str = "RS256", header: dict[str, Any] | None = None, **claims: Any
) -> str:
    named = {"alg": algorithm, "kid": key.kid, "typ": "JWT", **(header or {})}
    content = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not None}
    registry = JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    return jwt.encode(named, content, key, registry=registry)


def signed_with_secret(secret: bytes, key_id: str) -> str:
    """Return a token under HS256; the library refuses to make one with a public key as its secret."""
    head, _, _ = raw({"alg": "HS256", "kid": key_id}, CLAIMS).rpartition(".")
    return f"{head}.{encode(hmac.digest(secret, head.encode(), 'sha256'))}"


def raw(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def signed_by_hand(header: dict[str, Any]) -> str:
    """Return a token of the issuer with any header; the library refuses to make some."""
    signer = RSA.private_key
    head = raw(header, CLAIMS).rpartition(".")[0]
    return f"{head}.{encode(signer.sign(head.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@pytest.mark.parametrize(("key", "algorithm"), [(RSA, "RS256"), (EC, "ES256")], ids=["RS256", "ES256"])
def test_a_good_token_names_its_bearer_and_his_groups(place: Place, key: Any, algorithm: str) -> None:
    bearer = place.verifier.verify(signed(key, algorithm))
    assert bearer.principals == (OID, GROUP)
    assert bearer.expires_at == NOW + 3600 + limits.TOKEN_SKEW_SECONDS


def test_what_is_accepted_beside_the_usual(place: Place) -> None:
    verify = place.verifier.verify
    assert verify(signed(oid=None, appid=APPID)).principals == (APPID, GROUP)
    assert verify(signed(appid=APPID)).principals == (OID, GROUP), "the object id is whom roles are given to"
    assert verify(signed(groups=None)).principals == (OID,)
    assert verify(signed(oid=OID.upper(), groups=[GROUP.upper()])).principals == (OID, GROUP)
    assert verify(signed(aud=["x", AUDIENCE])).principals
    assert verify(signed(exp=NOW - limits.TOKEN_SKEW_SECONDS + 1)).principals
    assert verify(signed(nbf=NOW + limits.TOKEN_SKEW_SECONDS, iat=None)).principals
    assert verify(signed(header={"x5t": "x", "nonce": "unknown parameters are ignored"})).principals


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"iss": ISSUER + "/"}, "another issuer"),
        ({"iss": None}, "another issuer"),
        ({"iss": [ISSUER]}, "another issuer"),
        ({"aud": "https://vault.azure.net"}, "another audience"),
        ({"aud": None}, "another audience"),
        ({"aud": []}, "another audience"),
        ({"aud": {AUDIENCE: 1}}, "another audience"),
        ({"exp": NOW - limits.TOKEN_SKEW_SECONDS}, "expired"),
        ({"exp": None}, "expired"),
        ({"exp": str(NOW + 99)}, "no time"),
        ({"exp": True}, "no time"),
        ({"exp": float("inf")}, "no time"),
        ({"exp": float("nan")}, "no time"),
        ({"nbf": NOW + limits.TOKEN_SKEW_SECONDS + 1}, "not valid yet"),
        ({"iat": NOW + limits.TOKEN_SKEW_SECONDS + 1}, "not valid yet"),
        ({"nbf": "now"}, "no time"),
        ({"oid": None}, "no GUID"),
        ({"oid": "client/administrator"}, "no GUID"),
        ({"oid": [OID]}, "no GUID"),
        ({"oid": OID + "\n"}, "no GUID"),
        ({"groups": ["client/administrator"]}, "no GUID"),
        ({"groups": GROUP}, "malformed"),
        ({"groups": [GROUP] * (limits.TOKEN_GROUPS_MAX + 1)}, "too"),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, dict) else "",
)
def test_a_token_with_bad_claims_is_refused(place: Place, claims: dict[str, Any], why: str) -> None:
    assert why in place.refusal(signed(**claims))


def test_no_algorithm_but_the_two(place: Place) -> None:
    """The classics: alg none, and HS256 with the public key as its secret (RFC 8725, section 2.1)."""
    for name in ("none", "None", "NONE", ""):
        place.refusal(raw({"alg": name, "kid": "rsa"}, CLAIMS))
    for secret in (
        RSA.as_pem(private=False),
        json.dumps(RSA.as_dict(private=False)).encode(),
        RSA.as_der(False),
    ):
        for key_id in ("rsa", "ec"):
            place.refusal(signed_with_secret(secret, key_id))
    for algorithm in ("RS384", "PS256"):
        place.refusal(signed(RSA, algorithm))
    place.refusal(signed(RSA, "RS256", {"kid": "ec"}))
    place.refusal(signed(EC, "ES256", {"kid": "rsa"}))


def test_no_key_but_the_issuers(place: Place) -> None:
    """A key that the token brings along, or another key under the issuer's name, is not believed."""
    other = RSAKey.generate_key(2048, {"kid": "rsa"})
    place.refusal(signed(other))
    place.refusal(signed(other, header={"jwk": other.as_dict(private=False)}))
    place.refusal(signed(other, header={"jku": "https://127.0.0.1/keys", "x5u": "https://127.0.0.1/"}))
    for key_id in (None, 1, ["rsa"], "", "unknown", "../rsa"):
        token = signed()
        _, claims, signature = token.split(".")
        header = base64.urlsafe_b64encode(json.dumps({"alg": "RS256", "kid": key_id}).encode()).rstrip(b"=")
        place.refusal(f"{header.decode()}.{claims}.{signature}")


def test_a_changed_token_is_refused(place: Place) -> None:
    token = signed()
    header, claims, signature = token.split(".")
    forged = base64.urlsafe_b64encode(json.dumps({**CLAIMS, "oid": APPID}).encode()).rstrip(b"=").decode()
    for bad in (
        f"{header}.{forged}.{signature}",
        f"{header}.{claims}.",
        f"{header}.{claims}",
        f"{header}.{claims}.{signature[:-4]}",
        token + ".",
        token[1:],
        "",
        ".",
        "..",
        "a.b.c",
        "x" * limits.TOKEN_BYTES_MAX,
        "x" * (limits.TOKEN_BYTES_MAX + 1),
        token.encode().hex(),
        "ä" + token,
        raw({"alg": "RS256", "kid": "rsa", "crit": ["exp"]}, CLAIMS, b"s"),
        raw([], CLAIMS),  # type: ignore[arg-type]
        raw({"alg": "RS256", "kid": "rsa"}, [1], b"s"),  # type: ignore[arg-type]
        base64.urlsafe_b64encode(b'{"a":' * 2000).decode() + ".e30.e30",
    ):
        place.refusal(bad)


def test_a_signed_token_that_demands_an_unknown_extension_is_refused(place: Place) -> None:
    """RFC 7515, 4.1.11: also an extension that the library would process; none is known here."""
    for demanded in (["exp"], ["alg"], ["b64"], [], "exp", None):
        token = signed_by_hand({"alg": "RS256", "kid": "rsa", "exp": 1, "b64": True, "crit": demanded})
        place.refusal(token)
    assert place.verifier.verify(signed_by_hand({"alg": "RS256", "kid": "rsa", "exp": 1})).principals


def test_a_token_that_is_too_large_is_refused_however_well_it_is_signed(place: Place) -> None:
    """G8: before anything of it is read."""
    small = len(signed(filler=""))
    fits = (limits.TOKEN_BYTES_MAX - small) * 3 // 4 - 8
    assert place.verifier.verify(signed(filler="x" * fits)).principals
    assert "too large" in place.refusal(signed(filler="x" * (fits + 16)))


# -- the issuer's keys ----------------------------------------------------------------------


def test_a_rotated_key_is_found_and_the_old_one_forgotten(place: Place) -> None:
    """An unknown key id fetches the keys anew; what the issuer no longer publishes is refused."""
    old, new = signed(), RSAKey.generate_key(2048, {"kid": "new"})
    place.verifier.verify(old)
    place.publish(new)
    place.clock.seconds += limits.TOKEN_KEYS_PAUSE_SECONDS
    assert place.verifier.verify(signed(new)).principals
    place.refusal(old)


def test_the_old_key_is_forgotten_in_time_also_when_nobody_uses_the_new_one(place: Place) -> None:
    token = signed()
    place.verifier.verify(token)
    place.publish(EC)
    place.clock.seconds += limits.TOKEN_KEYS_RENEWAL_SECONDS + 1
    place.refusal(token)


def test_unknown_keys_make_nobody_fetch_without_a_pause(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: whatever callers send, the keys are fetched at most every few seconds."""
    reads = []
    original = IssuerKeys._read

    def counted(keys: IssuerKeys) -> bytes:
        reads.append(1)
        return original(keys)

    monkeypatch.setattr(IssuerKeys, "_read", counted)
    stranger = RSAKey.generate_key(2048, {"kid": "stranger"})
    for _ in range(50):
        place.refusal(signed(stranger))
        place.verifier.verify(signed())
    assert len(reads) == 1
    place.clock.seconds += limits.TOKEN_KEYS_PAUSE_SECONDS
    for _ in range(50):
        place.refusal(signed(stranger))
    assert len(reads) == 2


def test_keys_are_trusted_for_an_hour_without_their_issuer(place: Place) -> None:
    place.verifier.verify(signed())
    place.file.unlink()
    for _ in range(11):
        place.clock.seconds += limits.TOKEN_KEYS_RENEWAL_SECONDS
        assert place.verifier.verify(signed()).principals
    place.clock.seconds += limits.TOKEN_KEYS_RENEWAL_SECONDS + 1
    place.refusal(signed())
    place.publish(RSA)
    place.clock.seconds += limits.TOKEN_KEYS_PAUSE_SECONDS
    assert place.verifier.verify(signed()).principals


SHORT = rsa.generate_private_key(65537, 1024).public_key().public_numbers().n
_PUBLIC = RSA.as_dict(private=False)
BAD_KEY_SETS = {
    "nothing": "",
    "no keys": "{}",
    "a list": "[]",
    "a number": '{"keys": 1}',
    "numbers": '{"keys": [1]}',
    "an empty key": '{"keys": [{}]}',
    "deep": "[" * 9000,
    "a tiny RSA key": json.dumps({"keys": [{**_PUBLIC, "n": "AQ"}]}),
    "a short RSA key": json.dumps({"keys": [{**_PUBLIC, "n": encode(SHORT.to_bytes(128, "big"))}]}),
    "a secret": json.dumps({"keys": [{"kid": "rsa", "kty": "oct", "k": "c2VjcmV0"}]}),
    "a key to encrypt with": json.dumps({"keys": [{**_PUBLIC, "use": "enc"}]}),
    "too many": json.dumps({"keys": [_PUBLIC] * (limits.TOKEN_KEYS_MAX + 1)}),
    "too long": " " * limits.TOKEN_KEYS_BYTES_MAX + json.dumps({"keys": [_PUBLIC]}),
}


@pytest.mark.parametrize("content", BAD_KEY_SETS.values(), ids=BAD_KEY_SETS)
def test_a_bad_key_set_gives_no_key(place: Place, content: str) -> None:
    place.file.write_text(content)
    place.refusal(signed())


def test_keys_over_http_or_from_elsewhere_cannot_be_configured() -> None:
    for url in (
        "http://127.0.0.1/keys",
        "https://example.org/keys",
        "https://127.0.0.1.example.org/",
        "file:///x",
    ):
        with pytest.raises(ValueError, match="keys"):
            TokenSettings("127.0.0.1:1", ISSUER, AUDIENCE, url, "")


def test_a_redirect_is_not_followed() -> None:
    """Whoever answers for the issuer cannot send a partition elsewhere."""
    asked: list[str] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Redirecting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        keys = IssuerKeys(f"http://127.0.0.1:{server.server_address[1]}/keys", "")
        reader: Callable[[], bytes] = keys._fetch
        with pytest.raises(OSError, match="302"):
            reader()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == ["/keys"]


# -- the development issuer ------------------------------------------------------------------


def test_the_development_issuers_tokens_are_accepted(tmp_path: Path) -> None:
    pool_id = "0" * 31 + "1"
    issuer = Issuer(TokenIssuerSettings(pool_id, "127.0.0.1:1", ISSUER, AUDIENCE, _IDENTITY))
    (tmp_path / "keys.json").write_text(json.dumps(issuer.key_set()))
    settings = TokenSettings("127.0.0.1:2", ISSUER, AUDIENCE, str(tmp_path / "keys.json"), "")
    verifier = TokenVerifier(settings, IssuerKeys(settings.keys, ""))
    made = issuer.token("alice", ["team"])
    bearer = verifier.verify(made["access_token"])
    assert bearer.principals == (made["oid"], *made["groups"])
    assert bearer.principals == (object_id(pool_id, "alice"), object_id(pool_id, "group/team"))
    assert "d" not in issuer.key_set()["keys"][0], "the key set is public"


def test_a_client_assertion_is_exchanged_for_a_token_that_ends_with_it() -> None:
    """As az logs in: its own token only, not for another client, and never for longer."""
    issuer = Issuer(TokenIssuerSettings("0" * 32, "127.0.0.1:1", ISSUER, AUDIENCE, _IDENTITY))
    shown = issuer.token("alice", ["team"])
    answer = issuer.token_for(shown["access_token"], shown["oid"])
    again = issuer.token_for(answer["access_token"], shown["oid"])

    def claims(token: str) -> dict[str, Any]:
        body = token.split(".")[1]
        found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=="))
        return found

    for made in (answer, again):
        found = claims(made["access_token"])
        assert {name: found[name] for name in ("oid", "groups", "exp")} == {
            name: shown[name] for name in ("oid", "groups", "exp")
        }
        assert 0 < made["expires_in"] <= limits.DEVELOPMENT_TOKEN_SECONDS
    other = Issuer(TokenIssuerSettings("0" * 32, "127.0.0.1:1", ISSUER, AUDIENCE, _IDENTITY))
    bad = [
        (shown["access_token"], issuer.token("bob", [])["oid"]),
        (other.token("alice", ["team"])["access_token"], shown["oid"]),
        (shown["access_token"][:-4], shown["oid"]),
        ("", shown["oid"]),
        ("x.y.z", shown["oid"]),
    ]
    for assertion, client_id in bad:
        with pytest.raises(ValueError, match="assertion"):
            issuer.token_for(assertion, client_id)


def test_a_token_that_expires_during_a_call_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may outlive its caller's token: each of its messages asks anew who the caller is."""
    caller = Caller(f"token/{OID}", Kind.CLIENT, principals=(OID,), expires_at=NOW)
    monkeypatch.setattr(interceptors._call, "caller", caller, raising=False)
    monkeypatch.setattr(interceptors.time, "time", lambda: NOW - 1)
    assert interceptors.current_caller() is caller
    monkeypatch.setattr(interceptors.time, "time", lambda: NOW)
    with pytest.raises(Unauthenticated):
        interceptors.current_caller()
