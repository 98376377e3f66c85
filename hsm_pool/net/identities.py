"""Who calls: by the client certificate of a plane, or by a bearer token."""

from __future__ import annotations

import grpc

from hsm_pool.errors import Unauthenticated
from hsm_pool.net.authorization import Caller, Kind, identify
from hsm_pool.tokens.verification import TokenVerifier

_SCHEME = "bearer "


class CertificateIdentities:
    """Callers of the planes whose listeners demand a client certificate."""

    def __init__(self, pool_id: str) -> None:
        self._pool_id = pool_id

    def __call__(self, context: grpc.ServicerContext) -> Caller:
        """Return the caller.

        Raises:
            Unauthenticated: His certificate is no identity of this pool.
        """
        uris = [bytes(uri).decode() for uri in context.auth_context().get("peer_uri", ())]
        return identify(uris, self._pool_id)


class TokenIdentities:
    """Callers that present a token in the metadata ``authorization`` (RFC 6750). They are always clients."""

    def __init__(self, verifier: TokenVerifier) -> None:
        self._verifier = verifier

    def __call__(self, context: grpc.ServicerContext) -> Caller:
        """Return the caller.

        Raises:
            Unauthenticated: He presents no token, several, or one that is not acceptable.
        """
        presented = [value for name, value in context.invocation_metadata() if name == "authorization"]
        if len(presented) != 1 or not isinstance(presented[0], str):
            raise Unauthenticated("exactly one bearer token is needed")
        return self.bearer(presented[0])

    def bearer(self, authorization: str) -> Caller:
        """Return the caller who sends this authorization, over gRPC or HTTP.

        Raises:
            Unauthenticated: It is no token, or one that is not acceptable.
        """
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated("the scheme of the authorization is Bearer")
        bearer = self._verifier.verify(authorization[len(_SCHEME) :])
        return Caller(
            f"token/{bearer.principals[0]}",
            Kind.CLIENT,
            principals=bearer.principals,
            expires_at=bearer.expires_at,
        )
