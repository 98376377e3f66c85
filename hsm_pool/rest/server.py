"""The REST front of one partition: its routes, its listener and its challenge."""

from __future__ import annotations

from hsm_pool.net.calls import Translator
from hsm_pool.net.identities import TokenIdentities
from hsm_pool.net.interceptors import Passage
from hsm_pool.net.role_gate import RoleGate
from hsm_pool.partition.ceremonies import Ceremonies
from hsm_pool.partition.partition import Partition
from hsm_pool.rest.front import Front
from hsm_pool.rest.http_server import HttpServer
from hsm_pool.rest.security_domain_routes import SecurityDomainRoutes
from hsm_pool.settings import RestSettings, TokenSettings
from hsm_pool.tokens.issuer_keys import IssuerKeys
from hsm_pool.tokens.verification import TokenVerifier


def rest_server(
    partition: Partition, ceremonies: Ceremonies, rest: RestSettings, tokens: TokenSettings
) -> HttpServer:
    """Return the front, not started yet; it is served under the certificate of the client plane.

    Raises:
        OSError: Its endpoint is in use.
    """
    settings = partition.settings
    passage = Passage(settings.index, Translator(partition), RoleGate(partition), partition.audit.log)
    identities = TokenIdentities(TokenVerifier(tokens, IssuerKeys(tokens.keys, tokens.keys_ca_file)))
    # RFC 6750, with the parameters that Azure's clients read.
    challenge = f'Bearer authorization="{rest.authority}", resource="{tokens.audience}"'
    routes = SecurityDomainRoutes(partition, ceremonies).routes()
    return HttpServer(rest.endpoint, settings.client_plane, Front(passage, identities, challenge, routes))
