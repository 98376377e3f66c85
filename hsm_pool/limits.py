"""Every bound of the pool, with its unit and its reason."""

from __future__ import annotations

from typing import Final

KEY_ID_LENGTH_MAX: Final = 127
"""Characters of a key id (Azure Key Vault, service limits)."""

KEYS_MAX: Final = 5_000
"""Keys per pool, soft-deleted ones included (Azure Managed HSM service limits)."""

VERSIONS_PER_KEY_MAX: Final = 100
"""Versions per key (Azure Managed HSM service limits)."""

TAGS_MAX: Final = 15
"""Tags per key version (Azure Key Vault)."""

TAG_LENGTH_MAX: Final = 256
"""Characters of a tag's name and of its value (Azure Key Vault)."""

PAGE_SIZE_MAX: Final = 25
"""Items of a page (Key Vault REST API, maxresults)."""

BATCH_ITEMS_MAX: Final = 256
"""Items of a batch with an EC or oct key: about 10 ms of work."""

BATCH_ITEMS_RSA_MAX: Final = 32
"""Items of a batch with an RSA key: about 30 ms of work at 2048 bits."""

PAYLOAD_BYTES_MAX: Final = 64 * 1024
"""Bytes of one plaintext, ciphertext or additional data."""

WRAPPED_KEY_BYTES_MAX: Final = 1024
"""Bytes of a key to wrap with AES-KW; more than any key of this pool."""

MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Bytes of one gRPC message; also grpcio's own default for receiving."""

REQUEST_BYTES_MAX: Final = 3 * 1024 * 1024
"""Bytes of one request: the answer to a full batch, with its vectors and tags, still is one message."""

REQUEST_READ_SECONDS_MAX: Final = 10.0
"""How long a call may take to send its request."""

IMPORT_BYTES_MAX: Final = 16 * 1024
"""Bytes of imported key material; an RSA-4096 PKCS#8 has about 2.4 KiB."""

RANDOM_BYTES_MAX: Final = 128
"""Bytes of one GetRandomBytes (Key Vault REST API, /rng)."""

REQUEST_RETENTION_MS: Final = 24 * 3600 * 1000
"""How long the first answer to a request_id is kept."""

REQUESTS_MAX: Final = 20_000
"""Answered requests kept at most; the oldest go first."""

REQUESTS_BYTES_MAX: Final = 32 * 1024 * 1024
"""Bytes of answered requests kept at most, as they are stored; the oldest go first."""

RECOVERABLE_DAYS_MIN: Final = 7
"""Days of retention at least (Azure Managed HSM)."""

RECOVERABLE_DAYS_MAX: Final = 90
"""Days of retention at most, and the default (Azure Managed HSM)."""

ROTATION_DAYS_MIN: Final = 28
"""Days between two automatic rotations, and of a rotated version's life, at least (Azure Managed HSM)."""

ROTATION_DAYS_MAX: Final = 36_525
"""Days of a duration of a rotation policy at most: a century."""

DURATION_LENGTH_MAX: Final = 24
"""Characters of a duration of a rotation policy; the longest that says anything has 24."""

DUE_KEYS_PER_PASS: Final = 1_000
"""Keys that one pass of the due work looks at: about a millisecond."""

DUE_ACTIONS_PER_PASS: Final = 16
"""Keys that one pass of the due work purges or rotates."""

OFFICERS_MIN: Final = 3
"""Officers of a security domain at least (Azure Managed HSM)."""

OFFICERS_MAX: Final = 10
"""Officers of a security domain at most (Azure Managed HSM)."""

QUORUM_MIN: Final = 2
"""Quorum of a security domain at least (Azure Managed HSM)."""

CALLS_IN_FLIGHT_MAX: Final = 64
"""Calls under way at a listener of the peer, fabric or node plane."""

CLIENT_CALLS_MAX: Final = 512
"""Calls that a listener of the client plane takes from the wire; admission decides about each of them."""

UNREAD_BYTES_COUNTED: Final = 16 * 1024
"""Answers of fewer bytes are not counted: 512 calls of a listener are 8 MiB of them."""

UNREAD_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bytes of answers of one listener that their callers have not taken yet; half of it of one principal."""

UNREAD_SECONDS_MAX: Final = 30.0
"""How long a caller may take to read a large answer."""

REQUESTS_READ_MAX: Final = 64
"""Calls of one listener for clients whose request has not come yet; each keeps a thread."""

STREAMS_MAX: Final = 8
"""Open streams of one partition; each keeps a thread of its server."""

CONTROL_STREAMS_MAX: Final = 4
"""Open streams of one partition that need no role: reflection."""

STREAM_WAIT_SECONDS: Final = 10.0
"""How long a message of a stream waits for its turn."""

OPERATIONS_RUNNING_MAX: Final = 4
"""Operations and reads that run at once in one partition; their interpreter also renews the lease."""

OPERATIONS_PAUSED_MAX: Final = 16
"""Operations that only wait for a lease or a stable record, while others run in their place."""

OPERATIONS_WAITING_MAX: Final = 32
"""Operations and reads that wait for their turn; more are refused as OVERLOADED."""

MUTATIONS_RUNNING_MAX: Final = 24
"""Mutations under way in one partition; they mostly wait for the store."""

MUTATIONS_WAITING_MAX: Final = 24
"""Mutations that wait for their turn."""

CONTROL_RUNNING_MAX: Final = 8
"""Questions for health, status and evidence, and steps of ceremonies, that run at once."""

CONTROL_WAITING_MAX: Final = 8
"""Those that wait for their turn."""

RSA_KEYS_RUNNING_MAX: Final = 2
"""RSA keys that are made at once in one partition, each by a thread of the generator's."""

RSA_KEYS_WAITING_MAX: Final = 6
"""Mutations that wait for the generator of RSA keys: with those above, a third of all."""

RSA_KEY_WAIT_SECONDS: Final = 10.0
"""How long one waits for the generator; a key of 4096 bits takes about a second."""

QUEUE_SECONDS_MAX: Final = 1.0
"""How long any other call waits for its turn, and never longer than half of the time that is left to it."""

RETRY_SECONDS_MIN: Final = 0.02
"""RetryInfo of a refused call, at least."""

RETRY_SECONDS_MAX: Final = 2.0
"""RetryInfo of a refused call, at most; a client believes no more either."""

ROLE_DEFINITIONS_MAX: Final = 50
"""Custom role definitions of a pool (Azure Managed HSM service limits)."""

ROLE_ASSIGNMENTS_AT_POOL_MAX: Final = 50
"""Role assignments that hold for the whole pool (Azure Managed HSM service limits)."""

ROLE_ASSIGNMENTS_AT_KEY_MAX: Final = 10
"""Role assignments at one key's scope (Azure Managed HSM service limits)."""

ROLE_ASSIGNMENTS_MAX: Final = 5_000
"""Role assignments of a pool: each new one is compared with all of them, about 5 ms."""

ROLE_ASSIGNMENTS_OF_PRINCIPAL_MAX: Final = 200
"""Role assignments of one principal: every check of his reads them all."""

ROLE_NAME_LENGTH_MAX: Final = 256
"""Characters of a custom role's name."""

ROLE_DESCRIPTION_LENGTH_MAX: Final = 1024
"""Characters of a custom role's description."""

PRINCIPAL_ID_LENGTH_MAX: Final = 256
"""Characters of a principal: client/NAME of a certificate, or the GUID of a user, application or group."""

TOKEN_BYTES_MAX: Final = 12 * 1024
"""Characters of a bearer token; one with 200 groups has about 11,000. gRPC metadata has 16 KiB."""

TOKEN_GROUPS_MAX: Final = 200
"""Groups of a bearer token (Microsoft Entra ID puts no more into one)."""

DEVELOPMENT_TOKEN_SECONDS: Final = 3600
"""Life of a token of the development profile's issuer."""

TOKEN_SKEW_SECONDS: Final = 60
"""How far the clock of the issuer may be off."""

TOKEN_KEYS_BYTES_MAX: Final = 64 * 1024
"""Key set of a token issuer."""

TOKEN_KEYS_MAX: Final = 32
"""Keys of a token issuer."""

TOKEN_KEYS_PAUSE_SECONDS: Final = 5.0
"""An issuer's keys are fetched at most this often, whatever callers send."""

TOKEN_KEYS_RENEWAL_SECONDS: Final = 300.0
"""They are fetched again at their first use after this time."""

TOKEN_KEYS_SECONDS_MAX: Final = 3600.0
"""So long they are trusted while the issuer does not answer."""

TOKEN_KEYS_FETCH_SECONDS: Final = 2.0
"""How long fetching them may take."""

COMMANDS_PER_TRANSACTION_MAX: Final = 40
"""Mutations committed together (group commit)."""

OPERATIONS_PER_TRANSACTION_MAX: Final = 120
"""Puts and deletes of one transaction; etcd's default allows 128."""

TRANSACTION_BYTES_MAX: Final = 1024 * 1024
"""Records of one transaction, as they are stored; etcd's default allows 1.5 MiB with everything else."""

GROUP_BYTES_MAX: Final = 256 * 1024
"""Records of mutations that are committed together: etcd keeps its last 6,000 transactions in memory."""

KEY_STORED_BYTES_MAX: Final = 900_000
"""A key with all its versions and tags, as stored: it is restored in one transaction."""

LOG_RING_ENTRIES: Final = 65_536
"""Log entries kept in the store (sequence modulo this number)."""

LOG_ENTRY_BYTES: Final = 16 * 1024
"""A log entry of the mutations that one partition runs at once (about 72 changes, 24 audit records)."""

KEYS_BYTES_MAX: Final = 512 * 1024 * 1024
"""All keys of a pool with their versions, as they are stored; every partition holds them in memory, too."""

STAGED_BYTES_MAX: Final = KEYS_BYTES_MAX + KEYS_BYTES_MAX // 8
"""What a full restore stages beside the keys that are there: as much, with the roles."""

STORE_QUOTA_BYTES: Final = 4 * 1024 * 1024 * 1024
"""What a store member of the pool's own may hold; at its quota etcd takes no writes at all.

All that a pool may hold at once (keys, what is staged, answered requests four times, the log ring) is
less than STORE_FULL_SHARE of it, with room for what was written since the last compaction.
"""

STORE_QUOTA_BYTES_MIN: Final = 16 * 1024 * 1024
"""Less is no pool."""

STORE_QUOTA_BYTES_MAX: Final = 8 * 1024 * 1024 * 1024
"""etcd's own advice."""

STORE_QUOTA_EXTERNAL_BYTES: Final = 2 * 1024 * 1024 * 1024
"""The same of somebody else's etcd: its own default."""

STORE_FULL_SHARE: Final = 0.7
"""From here on clients change nothing that makes a pool larger; renewals and deletions have the rest."""

STORE_FILE_SHARE: Final = 0.9
"""A member's file of this size is defragmented, if that makes it smaller."""

STORE_COMPACT_SHARE: Final = 1 / 32
"""When so much was written since the last compaction, the next one is due."""

LEASE_SECONDS: Final = 3.0
"""T: how long a committed renewal lets a partition serve, on its own clock."""

RENEWAL_SECONDS: Final = 0.5
"""Renewals are sent this often, and at once after a mutation."""

CLOCK_RATE_ERROR: Final = 0.01
"""Bound on the difference of clock rates between machines."""

WAIT_MARGIN_SECONDS: Final = 0.010
"""Added to T x (1 + rate error) by whoever waits for a lease to run out."""

CLOCK_SKEW_SECONDS_MAX: Final = 1.0
"""A partition whose clock is further from the median is not fresh."""

MUTATION_SECONDS_MAX: Final = 15.0
"""How long a mutation may wait for its acknowledgement when the caller sets no deadline."""

EPOCH_HOLD_SECONDS: Final = 15.0
"""How long a partition waits for the others to take a key-encryption key, and they ask for it."""

CEREMONY_SECONDS: Final = 3600
"""How long a ceremony waits for its officers."""

BACKUP_MANIFEST_BYTES_MAX: Final = 256 * 1024
"""Manifest of a full backup; it travels with each restore."""

BACKUP_PART_BYTES_MAX: Final = 2 * 1024 * 1024
"""One part of a full backup."""

KEY_BACKUP_BYTES_MAX: Final = 2 * 1024 * 1024
"""Backup of a single key with all its versions."""

ENCLAVE_MESSAGE_BYTES_MAX: Final = 64
"""Bytes of one request of the enclave interface; the largest legal one has about 20."""

ENCLAVE_CALLS_PER_SECOND: Final = 50
"""Commands of one identity on the fabric plane, and as many questions; the controller needs about two."""

ENCLAVE_CALLS_BURST: Final = 100
"""Commands of one identity on the fabric plane at once, and as many questions."""

ENCLAVE_REFUSALS_RECORD_SECONDS: Final = 1.0
"""How often the audit log is told of the commands that came too often."""

COMMAND_SECONDS_MAX: Final = 60
"""How long a command of the controller may be valid at most."""

EVIDENCE_TOKEN_BYTES_MAX: Final = 4096
"""One token of evidence: claims, a signature and a P-256 certificate have about 1.2 KiB."""

EVIDENCE_NONCE_BYTES_MIN: Final = 16
"""Nonce of a caller who asks for evidence, at least (RFC 9711 allows 8)."""

EVIDENCE_NONCE_BYTES_MAX: Final = 64
"""Nonce of a caller who asks for evidence, at most (RFC 9711)."""

ATTESTATION_AUTHORITIES_MAX: Final = 8
"""Authorities that may vouch for environments that keys are released to."""

RELEASE_NONCE_LENGTH_MAX: Final = 256
"""Characters of the nonce of a key release."""

RELEASE_POLICY_BYTES_MAX: Final = 16 * 1024
"""A release policy or admission policy."""

RELEASE_POLICY_DEPTH_MAX: Final = 8
"""Nested allOf and anyOf below an authority."""

RELEASE_POLICY_CONDITIONS_MAX: Final = 256
"""Conditions and authorities of a policy together."""

RELEASE_POLICY_NAME_LENGTH_MAX: Final = 256
"""Characters of a claim's name and of an authority."""

AUDIT_LINE_BYTES_MAX: Final = 16 * 1024
"""One line of an audit log's files; a record has about 400 bytes."""

AUDIT_FILE_BYTES: Final = 16 * 1024 * 1024
"""A file of audit records is followed by the next one at this size."""

AUDIT_PEERS_BYTES_MAX: Final = 16 * 1024 * 1024
"""What a partition has seen of the others' logs: AUDIT_LOGS_MAX notes of each, with two signers."""

AUDIT_RETENTION_MEBIBYTES: Final = 1024
"""Audit records that a partition keeps, unless its settings say otherwise."""

AUDIT_RETENTION_MEBIBYTES_MIN: Final = 64
"""Less would be two files or fewer."""

AUDIT_RETENTION_MEBIBYTES_MAX: Final = 1024 * 1024
"""A tebibyte."""

AUDIT_PAGE_RECORDS_MAX: Final = 1000
"""Records of one page of QueryRecords."""

AUDIT_PAGE_BYTES: Final = 1024 * 1024
"""Bytes of one page of QueryRecords or ExportRecords."""

AUDIT_SCAN_RECORDS_MAX: Final = 50_000
"""Records that one QueryRecords looks at; the next page goes on."""

AUDIT_PROOF_BYTES_MAX: Final = 256 * 1024
"""A proof's file: a record, a checkpoint, three certificates and at most 64 hashes."""

AUDIT_NOTE_SECONDS: Final = 30.0
"""The chain takes note of each partition's checkpoint this often, and only if something happened."""

AUDIT_LOGS_MAX: Final = 16
"""Logs of one partition that another one remembers: a partition begins a log once in its life."""

REST_THREADS: Final = 8
"""Requests of Azure's clients that a partition serves at the same time."""

REST_CONNECTIONS_MAX: Final = 64
"""Their connections that wait for a thread, and that are kept open between two requests."""

REST_SILENCE_SECONDS: Final = 10
"""Their connection is closed when nothing comes for so long."""

REST_REQUEST_SECONDS: Final = 30
"""A request, with headers and body, has come by then, however little of it comes at a time."""

REST_STOP_SECONDS: Final = 2
"""For requests under way when the partition stops."""

REST_HEADER_BYTES_MAX: Final = 32 * 1024
"""Request line and headers together; a token may have TOKEN_BYTES_MAX."""

REST_BODY_BYTES_MAX: Final = 1024 * 1024
"""A restore blob has at most half of it, and JSON writes some characters as two."""
