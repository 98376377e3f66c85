"""Deliberately broken builds: each takes one guarantee away, and names the tests that must notice.

A break is a replacement in a copied tree; shipped code has no switch that weakens it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BrokenBuild:
    """One break: the text ``old`` of a file, which must occur exactly once, becomes ``new``."""

    name: str
    guarantee: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_BACKUP = "tests/integration/test_backup.py"
_CEREMONIES = "tests/integration/test_ceremonies.py"
_AZURE_SUBMISSION = "tests/unit/security_domain/test_azure_submission.py"
_CEREMONY_KILL = "tests/integration/test_ceremony_kill.py"
_CEREMONY_REFUSALS = "tests/integration/test_ceremony_refusals.py"
_HARDENING = "tests/unit/enclave/test_hardening.py"
_KEY_PROPOSED = "new-generation-the new key-encryption key is proposed and not in force-partition"
_DUE = "tests/unit/test_rotation.py"
_ADMISSION = "tests/unit/test_admission.py"
_ROTATION = "tests/integration/test_share_rotation.py"

BROKEN_BUILDS: tuple[BrokenBuild, ...] = (
    BrokenBuild(
        "a mutation is acknowledged before it is committed",
        "G1",
        "hsm_pool/store/committer.py",
        "        if self._settle(head, transaction):\n            for submission, reply in accepted:\n"
        "                submission.operation.on_chain = True\n"
        "                submission.finish(transaction.sequence, reply)\n            return later\n",
        "        for submission, reply in accepted:\n            submission.finish(0, reply)\n"
        "        if self._settle(head, transaction):\n            return later\n",
        (
            "tests/integration/test_guarantees.py::test_nothing_is_acknowledged_without_a_majority_of_the_store",
        ),
    ),
    BrokenBuild(
        "an ambiguous commit is taken for committed",
        "G1",
        "hsm_pool/store/committer.py",
        "        committed = self._replica.transaction_at(transaction.sequence) == transaction.transaction_id\n",
        "        committed = True\n",
        ("tests/integration/test_guarantees.py::test_writers_on_all_partitions_lose_nothing_to_each_other",),
    ),
    BrokenBuild(
        "no freshness check",
        "G2",
        "hsm_pool/store/replica.py",
        "        return max(0.0, self._fresh_until - boot_time())\n",
        "        return limits.LEASE_SECONDS\n",
        (
            "tests/integration/test_guarantees.py::test_a_paused_partition_never_uses_a_key_under_its_old_state",
        ),
    ),
    BrokenBuild(
        "acknowledged before it is applied everywhere",
        "G2",
        "hsm_pool/core/freshness.py",
        "            if not shown and self._holds_on(hold) and now < hold.until:\n",
        "            if False:\n",
        (
            "tests/integration/test_guarantees.py::test_a_paused_partition_never_uses_a_key_under_its_old_state",
        ),
    ),
    BrokenBuild(
        "a share stands plain in the security-domain file",
        "G3",
        "security_domain/domain.py",
        "        token = wrap_to_officer(officer.public_key, officer.thumbprint, canonical(share))\n",
        "        wrap_to_officer(officer.public_key, officer.thumbprint, canonical(share))\n"
        "        token = mnemonic\n",
        ("tests/integration/test_guarantees.py::test_the_security_domain_file_holds_no_share",),
    ),
    BrokenBuild(
        "shares are not compared with their commitments",
        "G4",
        "security_domain/submission.py",
        "    if committed != entry.share_commitment:\n"
        '        raise ShareRefused("the share is not the one this officer was given", officer)\n',
        "    del committed\n",
        ("tests/integration/test_guarantees.py::test_a_forged_share_is_named",),
    ),
    BrokenBuild(
        "no floor of two serving partitions",
        "G5",
        "hsm_pool/core/membership.py",
        "    if len(remaining) < SERVING_MIN:\n",
        "    if len(remaining) < 0:\n",
        ("tests/unit/test_core.py::test_two_drains_cannot_both_win",),
    ),
    BrokenBuild(
        "sealed records are not bound to their id",
        "G6",
        "hsm_pool/store/sealing.py",
        '    return _binding("mhsm/record/v1", pool_id, epoch, record_type, opaque_id, sequence, previous_digest)\n',
        "    del opaque_id\n"
        '    return _binding("mhsm/record/v1", pool_id, epoch, record_type, sequence, previous_digest)\n',
        ("tests/integration/test_guarantees.py::test_a_sealed_record_opens_under_its_own_id_only",),
    ),
    BrokenBuild(
        "the table is not compared with the chain",
        "G6",
        "hsm_pool/store/replica.py",
        "        if last.table_digest != table.root():\n",
        "        if False:\n",
        ("tests/integration/test_guarantees.py::test_a_record_put_back_while_the_pool_sleeps_is_noticed",),
    ),
    BrokenBuild(
        "a rolled-back store is accepted",
        "G6",
        "hsm_pool/store/follower.py",
        "        noted = self._state.read_head(self._replica.keys)\n",
        "        noted = None\n",
        ("tests/integration/test_guarantees.py::test_a_store_rolled_back_while_the_pool_sleeps_is_noticed",),
    ),
    BrokenBuild(
        "the text of an unhandled exception reaches the client",
        "G8",
        "hsm_pool/net/interceptors.py",
        '    return InternalError(f"internal error, correlation id {correlation_id}")\n',
        '    return InternalError(f"internal error {error}, correlation id {correlation_id}")\n',
        ("tests/integration/test_guarantees.py::test_an_unhandled_exception_shows_a_correlation_id_only",),
    ),
    BrokenBuild(
        "the pool becomes active before every officer has proved his share",
        "G4",
        "hsm_pool/ceremony/child.py",
        "                everyone=True,\n",
        "                everyone=False,\n",
        (f"{_CEREMONIES}::test_a_repeated_download_gives_the_same_file_and_another_one_is_refused",),
    ),
    BrokenBuild(
        "a rotation takes effect before its new shares are proved",
        "G4",
        "hsm_pool/ceremony/child.py",
        "            return self._share_out(recovery)\n",
        "            result = self._share_out(recovery)\n"
        "            result.complete = True\n"
        "            return result\n",
        (f"{_ROTATION}::test_rotated_shares_open_and_old_ones_do_not_unlock_the_pool",),
    ),
    BrokenBuild(
        "a header that comes outside the chain is taken",
        "G6",
        "hsm_pool/store/replica.py",
        "                    if not key.startswith(chain.FRESH_PREFIX):\n",
        "                    if not key.startswith((chain.FRESH_PREFIX, chain.HEADER_KEY)):\n",
        (f"{_ROTATION}::test_a_header_put_back_is_noticed",),
    ),
    BrokenBuild(
        "keys are served while the pool is being restored",
        "G2",
        "hsm_pool/core/restore.py",
        "    if restore and not restore.phase.over:\n",
        "    if False:\n",
        ("tests/integration/test_backup.py::test_a_restore_is_all_or_nothing",),
    ),
    BrokenBuild(
        "the MAC of a manifest is not checked",
        "G6",
        "hsm_pool/backup/bundle.py",
        "    if not authentic or stated != (form, domain.pool_id, domain.generation):\n",
        "    if stated != (form, domain.pool_id, domain.generation):\n",
        ("tests/unit/test_backup_format.py::test_a_changed_manifest_is_refused",),
    ),
    BrokenBuild(
        "a key-encryption key is used before every serving partition holds it",
        "G1",
        "hsm_pool/core/epochs.py",
        "            if not command.serving <= pool.holders or len(pool.holders) < HOLDERS_MIN:\n",
        "            if False:\n",
        ("tests/unit/test_restore_and_epochs.py::test_an_epoch_needs_every_serving_partition_and_two",),
    ),
    BrokenBuild(
        "a share is taken for another purpose than its officer agreed to",
        "G4",
        "security_domain/submission.py",
        '    if (fields["purpose"], detail) != (context.purpose, context.detail):\n',
        "    if False:\n",
        (f"{_ROTATION}::test_a_share_given_for_a_proof_opens_no_rotation",),
    ),
    BrokenBuild(
        "a restart does not keep the floor of two",
        "G5",
        "hsm_pool/core/membership.py",
        "            _check_floor(command, pool)\n            return {}\n",
        "            return {}\n",
        ("tests/unit/test_core.py::test_a_restart_needs_a_drained_partition_and_two_others",),
    ),
    BrokenBuild(
        "the counter of the controller's commands is not written down",
        "G5",
        "hsm_pool/partition/command_counter.py",
        "            write_atomically(self._path, str(counter).encode())\n",
        "",
        ("tests/unit/test_command_counter.py::test_repeats_and_older_ones_are_refused_also_after_a_restart",),
    ),
    BrokenBuild(
        "unknown fields pass the guard of the fabric plane",
        "G5",
        "hsm_pool/net/enclave_guard.py",
        "    if len(UnknownFieldSet(message)):\n",
        "    if False:\n",
        ("tests/unit/test_enclave_guard.py::test_unknown_fields_are_refused",),
    ),
    BrokenBuild(
        "the planner takes a second partition out",
        "G5",
        "fabric_controller/planner.py",
        "        others_suffice = others_serving(picture, index) >= SERVING_MIN\n",
        "        others_suffice = True\n",
        ("tests/unit/fabric_controller/test_planner.py::test_g5_no_plan_takes_a_second_partition_out",),
    ),
    BrokenBuild(
        "evidence counts without the owner's signature",
        "G5",
        "hsm_pool/enclave/verifier.py",
        '        owner, owner_uri = self._opened(evidence.owner_token, self._anchors.owner_root, "owner")\n',
        '        owner, owner_uri = platform, platform_uri.replace("platform", "partition")\n',
        ("tests/unit/test_evidence.py::test_both_roots_must_have_certified",),
    ),
    BrokenBuild(
        "a peer is admitted whatever its evidence says of it",
        "G5",
        "hsm_pool/enclave/verifier.py",
        "            release_policy.require(self._policy, admission.AUTHORITY, claims.named())\n",
        "            pass\n",
        ("tests/integration/test_attestation.py::test_a_stolen_peer_identity_alone_is_given_nothing",),
    ),
    BrokenBuild(
        "an officer opens his share for an exchange key without evidence",
        "G4",
        "hsm_pool/cli/submit_share_command.py",
        "        require_evidence(attempt_file, attempt, anchors, attempt.exchange_public_key)\n",
        "",
        ("tests/integration/test_attestation.py::test_a_share_is_opened_for_an_attested_exchange_key_only",),
    ),
    BrokenBuild(
        "a partition that lost its state file serves all the same",
        "G6",
        "hsm_pool/store/replica.py",
        "        if known is None:\n",
        "        if False:\n",
        ("tests/integration/test_replace.py::test_a_partition_that_lost_its_disk_is_replaced",),
    ),
    BrokenBuild(
        "a partition that serves is replaced",
        "G5",
        "hsm_pool/core/membership.py",
        "    if command.index in command.serving:\n",
        "    if False:\n",
        ("tests/unit/test_core.py::test_only_a_dead_partition_is_replaced_and_a_repeat_goes_on_with_it",),
    ),
    BrokenBuild(
        "roles are not decided again in the commit",
        "G2",
        "hsm_pool/store/committer.py",
        "                if mutation.access:\n",
        "                if False:\n",
        ("tests/unit/test_roles.py::test_a_mutation_is_decided_again_in_its_batch",),
    ),
    BrokenBuild(
        "roles are not decided with the key",
        "G2",
        "hsm_pool/net/crypto_service.py",
        "            roles.check(view, access)\n            version",
        "            version",
        ("tests/integration/test_roles.py::test_a_role_at_a_key_holds_for_that_key_only",),
    ),
    BrokenBuild(
        "the audience of a token is not checked",
        "G8",
        "hsm_pool/tokens/verification.py",
        "        if settings.audience not in (audience if isinstance(audience, list) else [audience]):\n",
        "        if audience is Ellipsis:\n",
        ("tests/unit/tokens/test_tokens.py::test_a_token_with_bad_claims_is_refused",),
    ),
    BrokenBuild(
        "a method is without its data action",
        "G8",
        "hsm_pool/net/authorization.py",
        '            "GetRandomBytes": Rule((_A.RANDOM,)),\n',
        "",
        ("tests/integration/test_authorization.py::test_the_table_names_every_method_and_no_other",),
    ),
    BrokenBuild(
        "a role at one key holds for all",
        "G8",
        "hsm_pool/core/roles.py",
        "    return assigned in _WHOLE_POOL_SCOPES or assigned == wanted\n",
        "    return bool(assigned and wanted)\n",
        ("tests/unit/test_roles.py::test_no_access_without_its_data_action_at_its_scope",),
    ),
    BrokenBuild(
        "firmware below the pool's security version is activated",
        "G5",
        "hsm_pool/core/membership.py",
        "    if command.security_version < pool.security_version_floor:\n",
        "    if False:\n",
        ("tests/unit/test_core.py::test_the_security_version_of_a_pool_only_rises",),
    ),
    BrokenBuild(
        "an unpacked image is not compared with its metadata",
        "G5",
        "hsm_pool/firmware/slots.py",
        "        if found != (manifest, measurement):\n",
        "        if False:\n",
        ("tests/unit/firmware/test_slots.py::test_staging_is_repeatable_and_checks_what_was_unpacked",),
    ),
    BrokenBuild(
        "a partition is resumed although a new one was admitted in its place",
        "G5",
        "hsm_pool/core/membership.py",
        "            if admission and command.incarnation < admission.incarnation:\n",
        "            if False:\n",
        ("tests/unit/test_core.py::test_only_a_dead_partition_is_replaced_and_a_repeat_goes_on_with_it",),
    ),
    BrokenBuild(
        "a record is written after the answer has left",
        "G7",
        "hsm_pool/net/interceptors.py",
        "                response = handle(_parsed(octets, parse), context)\n                self._succeed()\n",
        "                response = handle(_parsed(octets, parse), context)\n                operation = record.current()\n"
        "                if operation and not operation.on_chain and method not in record.POLLED:\n"
        "                    threading.Timer(0.3, lambda: self._audit_log.append(operation.record())).start()\n",
        ("tests/integration/test_audit.py::test_every_operation_is_on_record_before_its_answer",),
    ),
    BrokenBuild(
        "a mutation does not carry its record",
        "G7",
        "hsm_pool/store/committer.py",
        "replica.keys, replica.index, head, replica.table, changes, header, records\n",
        "replica.keys, replica.index, head, replica.table, changes, header\n",
        ("tests/integration/test_audit.py::test_every_operation_is_on_record_before_its_answer",),
    ),
    BrokenBuild(
        "verify does not compare a checkpoint with the records",
        "G7",
        "hsm_pool/audit/verify.py",
        "            if anchor.checkpoint.root != tree.root():\n",
        "            if False:\n",
        ("tests/unit/audit/test_verify.py::test_a_rewritten_record_is_detected",),
    ),
    BrokenBuild(
        "verify does not look for a checkpoint that was dropped",
        "G7",
        "hsm_pool/audit/verify.py",
        "            if number not in shown and number >= first:\n",
        "            if False:\n",
        ("tests/unit/audit/test_verify.py::test_a_dropped_checkpoint_is_detected",),
    ),
    BrokenBuild(
        "verify believes a removal that no checkpoint covers",
        "G7",
        "hsm_pool/audit/verify.py",
        "for size, claim in reversed(claims) if size <= report.covered)",
        "for _, claim in reversed(claims))",
        ("tests/unit/audit/test_verify.py::test_a_removal_that_no_checkpoint_covers_is_no_retention",),
    ),
    BrokenBuild(
        "old records are removed before a checkpoint covers the record of it",
        "G7",
        "hsm_pool/audit/log.py",
        "        if covered < removal.size:\n            return 0\n",
        "",
        ("tests/unit/audit/test_log.py::test_the_oldest_files_go_with_the_retention",),
    ),
    BrokenBuild(
        "a witness cosigns a log that was rewritten",
        "G7",
        "hsm_pool/audit/witness.py",
        "        verify_consistency(size, root, checkpoint.size, checkpoint.root, proof)\n",
        "        del size, root, proof\n",
        ("tests/unit/audit/test_verify.py::test_a_witness_does_not_cosign_another_history",),
    ),
    BrokenBuild(
        "operations go on when their records cannot be written",
        "G7",
        "hsm_pool/audit/log.py",
        '        if self._on_failure == "stop":\n            raise',
        "        if False:\n            raise",
        ("tests/unit/audit/test_log.py::test_a_file_that_cannot_grow_stops_operations",),
    ),
    BrokenBuild(
        "shares of Azure's format are not compared with their commitments",
        "G4",
        "security_domain/azure/submission.py",
        "        wrapped.check(share)\n    except InvalidShare as error:\n",
        "        pass\n    except InvalidShare as error:\n",
        (f"{_AZURE_SUBMISSION}::test_a_wrong_share_is_named_even_at_exactly_the_quorum",),
    ),
    BrokenBuild(
        "first come, first served: no fairness between principals",
        "G8",
        "hsm_pool/core/admission.py",
        "            ticket = min(allowed, key=lambda entry: self._used[entry.principal])\n",
        "            ticket = allowed[0]\n",
        (f"{_ADMISSION}::test_who_used_least_is_next_and_a_batch_counts_as_the_work_it_is",),
    ),
    BrokenBuild(
        "a full queue refuses whoever comes last",
        "G8",
        "hsm_pool/core/admission.py",
        "        return next(entry for entry in reversed(waiting) if counts[entry.principal] == most)\n",
        "        return waiting[-1]\n",
        (f"{_ADMISSION}::test_a_full_queue_refuses_the_newest_of_the_greediest_only",),
    ),
    BrokenBuild(
        "one principal may hold every place",
        "G8",
        "hsm_pool/core/admission.py",
        "                if self._running_of.get(entry.principal, 0) < self.bounds.running_of_principal\n",
        "",
        (f"{_ADMISSION}::test_the_modest_one_runs_at_once_whatever_the_greedy_one_holds",),
    ),
    BrokenBuild(
        "a refusal does not say when to come back",
        "G8",
        "hsm_pool/net/interceptors.py",
        "        details.append(later)\n",
        "",
        (
            "tests/unit/client/test_client.py::test_the_delay_of_an_overload_crosses_the_wire_within_its_bounds",
        ),
    ),
    BrokenBuild(
        "log lines are not redacted",
        "G3",
        "hsm_pool/observability/logs.py",
        "            redact,\n",
        "",
        ("tests/unit/observability/test_logs.py::test_a_field_of_a_forbidden_name_is_redacted",),
    ),
    BrokenBuild(
        "an object store overwrites",
        "G8",
        "hsm_pool/client/locations.py",
        'self._filesystem.pipe_file(path, content, mode="create")',
        "self._filesystem.pipe_file(path, content)",
        ("tests/unit/client/test_locations.py::test_an_object_that_is_not_listed_yet_is_not_overwritten",),
    ),
    BrokenBuild(
        "parts of two snapshots in one backup",
        "G8",
        "hsm_pool/client/backups.py",
        "        elif location.read(_part(index), BACKUP_PART_BYTES_MAX) != content:\n",
        "        elif False:\n",
        ("tests/integration/test_backup.py::test_a_part_of_another_snapshot_is_never_taken_for_this_one",),
    ),
    BrokenBuild(
        "an old partition is restarted until it is taken for the new one",
        "G5",
        "hsm_pool/core/membership.py",
        "    incarnation = max(command.incarnation, number * INCARNATIONS_PER_ADMISSION)\n",
        "    incarnation = command.incarnation\n",
        ("tests/unit/test_core.py::test_only_a_dead_partition_is_replaced_and_a_repeat_goes_on_with_it",),
    ),
    BrokenBuild(
        "system calls are denied to one thread only",
        "G3",
        "hsm_pool/enclave/system_calls.py",
        "        calls.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)\n",
        "",
        (f"{_HARDENING}::test_denied_system_calls_fail_in_every_thread",),
    ),
    BrokenBuild(
        "Landlock is prepared and not applied",
        "G3",
        "hsm_pool/enclave/landlock.py",
        "        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))\n",
        "",
        (f"{_HARDENING}::test_landlock_leaves_what_was_named",),
    ),
    BrokenBuild(
        "the controller says that it is confined and is not",
        "G5",
        "fabric_controller/controller.py",
        "    hardening = confine(settings)\n",
        '    hardening = ["landlock"]\n',
        (
            "tests/integration/test_hardening.py::test_the_controller_reaches_its_own_files_and_the_enclave_interface_only",
        ),
    ),
    BrokenBuild(
        "a ceremony child may open a socket",
        "G3",
        "hsm_pool/enclave/system_calls.py",
        '    "socket",\n',
        "",
        (f"{_HARDENING}::test_denied_system_calls_fail_in_every_thread",),
    ),
    BrokenBuild(
        "a wrong padding is told apart from a wrong length",
        "G3",
        "hsm_pool/crypto/operations.py",
        "    except (InvalidTag, ValueError):\n        raise DecryptionFailed from None\n",
        "    except InvalidTag:\n        raise DecryptionFailed from None\n"
        '    except ValueError as error:\n        raise InvalidField(str(error), field="items") from None\n',
        ("tests/unit/crypto/test_operations.py::test_every_cause_of_a_failed_decryption_looks_the_same",),
    ),
    BrokenBuild(
        "a new generation seals the pool's keys to the old domain",
        "G4",
        "hsm_pool/partition/epochs.py",
        "    domain = new.domain if new else container.parse(header.security_domain_file)\n",
        "    domain = container.parse(old.security_domain_file)\n",
        (f"{_CEREMONY_KILL}::test_a_quorum_of_the_officers_in_force_unlocks_afterwards",),
    ),
    BrokenBuild(
        "a new generation changes the header before the new key is held",
        "G1",
        "hsm_pool/partition/ceremony_completion.py",
        "            epochs.rotate(partition, access, attempt.old_header_digest, new)\n",
        "            _replace(partition, attempt, access)\n"
        '            epochs.rotate(partition, access, b"", new)\n',
        (f"{_CEREMONY_KILL}::test_the_step_that_changes_the_officers[{_KEY_PROPOSED}]",),
    ),
    BrokenBuild(
        "a second ceremony begins at another partition",
        "G8",
        "hsm_pool/cli/begin_ceremony_commands.py",
        "        if ceremony:\n            fail(\n",
        "        if False:\n            fail(\n",
        (f"{_CEREMONY_REFUSALS}::test_a_ceremony_under_way_at_another_partition_is_named",),
    ),
    BrokenBuild(
        "the officers of a change are checked when the old quorum is complete",
        "G8",
        "hsm_pool/ceremony/child.py",
        "            checked = officers.check_officers(self._new_officers, begin.open.new_required)\n",
        "            checked = [officers.parse_officer(der) for der in self._new_officers]\n",
        (f"{_CEREMONY_REFUSALS}::test_a_change_of_officers_refuses_officers_and_quorums",),
    ),
    BrokenBuild(
        "any certificate issues the certificate of whoever signs a transcript",
        "G7",
        "hsm_pool/ceremony_runner/verification.py",
        "    if not authority_is_ca or is_ca:\n",
        "    if False:\n",
        ("tests/unit/ceremony_runner/test_certificates.py",),
    ),
    BrokenBuild(
        "what was made after the backup outlives the restore",
        "G1",
        "hsm_pool/core/restore.py",
        "    return {RESTORE: replace(restore, phase=RestorePhase.REMOVING)}\n",
        "    return {RESTORE: replace(restore, phase=RestorePhase.PLACING)}\n",
        (f"{_BACKUP}::test_a_restore_that_dies_undecided_is_repeated_or_cancelled[repeated]",),
    ),
    BrokenBuild(
        "a due rotation is not compared with the key it was found for",
        "G1",
        "hsm_pool/core/lifecycle.py",
        "        command.replaces != newest.version_id or not rotation.rotation_due(key, newest, command.time_ms)\n",
        "        False\n",
        (f"{_DUE}::test_a_rotation_is_due_at_its_date_and_once",),
    ),
    BrokenBuild(
        "a purge that was due is not decided again",
        "G1",
        "hsm_pool/core/lifecycle.py",
        "        if isinstance(command, PurgeDueKey):\n",
        "        if False:\n",
        (f"{_DUE}::test_a_deleted_key_is_purged_at_its_date_and_a_recovered_one_never",),
    ),
    BrokenBuild(
        "purge protection is not asked",
        "G1",
        "hsm_pool/core/lifecycle.py",
        "        if pool_record(view).purge_protection:\n",
        "        if False:\n",
        (f"{_DUE}::test_purge_protection_refuses_a_purge_before_the_date",),
    ),
    BrokenBuild(
        "the clock that is ahead decides what is due",
        "G1",
        "hsm_pool/core/freshness.py",
        "    return sorted(offsets.values())[(len(offsets) - 1) // 2]\n",
        "    return max(offsets.values())\n",
        (f"{_DUE}::test_one_wrong_clock_never_brings_a_date_forward",),
    ),
)
