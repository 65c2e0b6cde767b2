"""Proof that the tests of faults can fail: takes the handling of each fault out, one at a time, and runs its test.

    python tests/mutations.py [NAME ...]

Works on a copy of the checkout. Prints a line a mutation; ends with 1 if a test passed without what it is there for,
or fails in such a copy anyway. Two to ten minutes each. That every mutation still fits the code is a fast test, in
`tests/test_faults.py`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEARCH = "tests/faults/test_search_faults.py"
PLACES = "tests/execution/test_placement.py"
STORE = "tests/faults/test_object_store_faults.py"
STAGES = "tests/test_faults.py"
TRIALS = "tests/search/test_search_stage.py"
LATE = "tests/search/test_late_node.py"
ENDS = "tests/search/test_session_ends.py"
WORK = "tests/execution/test_workshop.py"
OBJECTS = "tests/test_objects.py"
PATIENCE = "tests/test_patience.py"
BANK = "tests/quantization/test_bank.py"
BANK_STAGE = "tests/pipeline/test_bank_stage.py"
DISK = "tests/pipeline/test_disk.py"
AT_URI = "tests/test_at_uri.py"
CHECKPOINT = "tests/models/test_checkpoint.py"
PROGRESS = "tests/pipeline/test_progress.py"
TAKEN_UP = "tests/search/test_timetable.py::test_a_search_taken_up_again_goes_on_as_it_would_have"
TIMED = "tests/search/test_timetable.py::test_how_long_trials_take_and_how_many_run_at_once_changes_no_plan"


@dataclass(frozen=True)
class Mutation:
    """Handling of a fault, and what is put in its place.

    Attributes:
        file: Below the checkout.
        old: Occurs once in it.
        new: What stands there instead.
        test: The test that must fail then: file and name.
    """

    file: str
    old: str
    new: str
    test: str


FINISH, JOBS = "qpruner/pipeline/finish.py", "qpruner/pipeline/jobs.py"
DRIVER, WORKER = "qpruner/search/tune/driver.py", "qpruner/search/tune/worker.py"
CLUSTER = "qpruner/execution/cluster.py"
MUTATIONS = {
    "a hub model with pickled weights only is fetched": Mutation(
        "qpruner/models/loading.py",
        "        check_hub_files(model)",
        "        pass",
        f"{CHECKPOINT}::test_a_hub_model_with_pickled_weights_only_is_refused",
    ),
    "a hub model with pickled weights only is worked on": Mutation(
        "qpruner/models/checkpoint.py",
        'if not any(fetched.glob("*.safetensors")):',
        "if False:",
        f"{CHECKPOINT}::test_a_hub_model_with_pickled_weights_only_is_refused",
    ),
    "a hub model whose weights were not fetched is said to have none": Mutation(
        "qpruner/models/checkpoint.py",
        "        check_hub_files(model)\n        raise _in_part(model, is_shared)",
        '        raise UserError(f"the hub\'s {model.source} has no .safetensors weights")',
        f"{CHECKPOINT}::test_a_hub_model_that_is_here_in_part_is_not_called_one_without_weights",
    ),
    "a hub model of which the hub's client knows that a part is missing is a defect of ours": Mutation(
        "qpruner/models/checkpoint.py",
        "    except LocalEntryNotFoundError as error:",
        "    except NotImplementedError as error:",
        f"{CHECKPOINT}::test_a_hub_model_that_is_here_in_part_is_not_called_one_without_weights",
    ),
    "a hub model that lacks a shard is worked on": Mutation(
        "qpruner/models/checkpoint.py",
        'check_folder(fetched, "`model.source`")',
        "pass",
        f"{CHECKPOINT}::test_a_hub_model_of_which_a_shard_is_missing_is_refused_before_work",
    ),
    "a killed worker's trial starts anew": Mutation(
        WORKER,
        "fetch(start) if start else None, self._report",
        "None, self._report",
        f"{SEARCH}::test_a_trial_whose_process_is_killed_goes_on_from_its_last_rung",
    ),
    "a trial may lose its worker for ever": Mutation(
        DRIVER,
        "if kills >= MAX_KILLS else {}",
        "if False else {}",
        f"{SEARCH}::test_a_trial_whose_process_dies_again_and_again_fails_and_the_others_do_not",
    ),
    "a machine's death is held against its trial": Mutation(
        DRIVER,
        "if node is not None and not stays(node):",
        "if False:",
        f"{SEARCH}::test_a_trial_whose_machine_dies_goes_on_elsewhere_and_that_is_not_held_against_it",
    ),
    "a broken machine takes one plan after the other": Mutation(
        DRIVER,
        "if len(failed) < MAX_ERRORS:",
        "if True:",
        f"{PLACES}::test_a_machine_with_a_broken_gpu_ends_the_search_and_its_trials_run_when_it_is_mended",
    ),
    "a rung that is said again speaks for a broken machine": Mutation(
        DRIVER,
        "        if is_news:\n",
        "        if True:\n",
        f"{PLACES}::test_a_broken_machine_is_known_though_trials_that_go_on_say_their_last_rung_there",
    ),
    "a damaged file is met by one trial after the other": Mutation(
        DRIVER,
        'if record.failure in ("storage", "damaged"):',
        'if record.failure == "storage":',
        f"{TRIALS}::test_a_damaged_file_ends_the_search_before_every_trial_has_met_it",
    ),
    "a damaged sign of life ends the search": Mutation(
        "qpruner/search/trial_records.py",
        "with contextlib.suppress(ValidationError):",
        "with contextlib.suppress(OSError):",
        f"{TRIALS}::test_a_damaged_sign_of_life_is_none",
    ),
    "a damaged clock ends the search": Mutation(
        "qpruner/search/trial_records.py",
        "        where = set_aside(_clock_path(folder, search), folder)\n",
        "        raise\n",
        f"{TRIALS}::test_of_a_damaged_clock_the_search_has_the_time_of_its_trials",
    ),
    "a machine's death is held against a trial whose worker was young": Mutation(
        "qpruner/execution/nodes.py",
        'return table.get("Address", {}).get("NodeID") or None',
        "return None",
        f"{SEARCH}::test_a_machine_that_dies_before_its_worker_has_told_anything_is_not_held_against_the_trial",
    ),
    "a checkpoint is compared when a command begins alone": Mutation(
        WORKER,
        "if begin_anew_if_damaged(job.trials, self._record, logger.warning):",
        "if False:",
        f"{SEARCH}::test_a_checkpoint_that_is_damaged_while_the_search_runs_is_not_gone_on_from",
    ),
    "workers stay on a machine that is drained": Mutation(
        WORKER,
        "if not stays(ray.get_runtime_context().get_node_id()):",
        "if False:",
        f"{SEARCH}::test_trials_leave_a_machine_that_is_drained_and_that_is_not_held_against_them",
    ),
    "a worker that loses its trial while it copies publishes": Mutation(
        WORKER,
        "        self._check_that_it_is_ours()\n        _drop_others",
        "        _drop_others",
        f"{PLACES}::test_a_worker_that_loses_its_trial_while_it_copies_a_checkpoint_publishes_nothing",
    ),
    "a worker that comes back writes": Mutation(
        WORKER,
        "if read_trial(self._job.trials, self._record.index).worker != self._record.worker:",
        "if False:",
        f"{SEARCH}::test_a_worker_that_was_taken_for_dead_writes_nothing_when_it_comes_back",
    ),
    "what goes wrong after a trial's last rung is its failure": Mutation(
        WORKER,
        "        if self._record.is_over:\n",
        "        if False:\n",
        f"{ENDS}::test_what_goes_wrong_after_its_last_rung_takes_nothing_from_a_trial",
    ),
    "a full disk of the driver's own is a defect": Mutation(
        "qpruner/search/tune/__init__.py",
        "    return trouble if storage_error(trouble) else None\n",
        "    return None\n",
        f"{ENDS}::test_a_driver_whose_own_disk_is_full_is_told_so",
    ),
    "a trial that failed after its last rung is stopped at it": Mutation(
        DRIVER,
        "if step >= self._job.config.search.steps:",
        "if False:",
        f"{TRIALS}::test_a_trial_that_failed_after_its_last_rung_is_finished_by_the_next_command",
    ),
    "nobody watches for trials that hang": Mutation(
        DRIVER,
        "if self._seen[trial_id][1] >= self._limit:",
        "if False:",
        f"{SEARCH}::test_a_hanging_trial_is_killed_and_its_slot_is_free_again",
    ),
    "trials hang while the storage is away": Mutation(
        DRIVER,
        "and not takes_pulses(self._trials):",
        "and False:",
        f"{TRIALS}::test_a_trial_does_not_hang_while_the_storage_cannot_be_told_of_progress",
    ),
    "a search without hours and machines waits for ever": Mutation(
        DRIVER,
        "if over and not self._room():",
        "if False:",
        f"{ENDS}::test_a_search_whose_hours_are_over_and_whose_machines_are_gone_ends_and_goes_on_when_one_is_back",
    ),
    "a search that waits for a machine says nothing": Mutation(
        "qpruner/execution/room.py",
        "                if not self._room:\n",
        "                if False:\n",
        "tests/execution/test_cluster.py"
        "::test_without_workers_a_search_is_refused_and_later_ones_are_found_as_they_come_and_go",
    ),
    "what Tune makes of a storage that is full is what a search ends with": Mutation(
        DRIVER,
        "            self._halt.end(error, at_once=True)\n",
        "            raise error\n",
        f"{ENDS}::test_a_disk_without_room_for_what_the_driver_writes_is_what_the_search_ends_with",
    ),
    "an error in a session's last step is forgotten": Mutation(
        "qpruner/search/tune/__init__.py",
        "        if halt.trouble:\n",
        "        if False:\n",
        f"{ENDS}::test_a_disk_without_room_for_what_the_driver_writes_is_what_the_search_ends_with",
    ),
    "a worker without room to say so was killed": Mutation(
        DRIVER,
        "if trial_id in self._starved:",
        "if False:",
        f"{ENDS}::test_a_worker_that_had_no_room_to_say_so_is_not_taken_for_one_that_was_killed",
    ),
    "a worker that is slow to leave a trial costs the next one": Mutation(
        "qpruner/search/tune/__init__.py",
        'os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(10**6)\n',
        "",
        f"{ENDS}::test_a_trial_waits_for_a_worker_that_is_slow_to_leave_the_trial_before_it",
    ),
    "nobody watches for workers that do not leave a trial": Mutation(
        DRIVER,
        "if trial.temporary_state.ray_actor is not None}",
        "if trial.status == Trial.RUNNING}",
        f"{ENDS}::test_a_worker_that_never_leaves_its_trial_is_killed_and_the_next_trial_is_not_blamed",
    ),
    "a worker that does not leave a trial is held against the next one": Mutation(
        DRIVER,
        "if trial_id in self._kept_waiting:",
        "if False:",
        f"{ENDS}::test_a_worker_that_never_leaves_its_trial_is_killed_and_the_next_trial_is_not_blamed",
    ),
    "the first Ctrl-C ends all": Mutation(
        "qpruner/search/tune/halt.py",
        "before = signal.signal(signal.SIGINT, self._on_signal)",
        "before = signal.getsignal(signal.SIGINT)",
        f"{SEARCH}::test_ctrl_c_once_finishes_the_rung_and_says_how_to_go_on",
    ),
    "the second Ctrl-C does nothing": Mutation(
        "qpruner/search/tune/halt.py",
        "            raise KeyboardInterrupt\n",
        "            return\n",
        f"{SEARCH}::test_ctrl_c_twice_leaves_at_once_and_can_go_on",
    ),
    "a damaged checkpoint is read": Mutation(
        "qpruner/pipeline/search.py",
        "    set_aside_damaged(context.run_dir.trials / trials_digest, search_digest, tell)\n",
        "",
        f"{SEARCH}::test_a_checkpoint_with_a_flipped_bit_is_named_and_its_trial_starts_anew",
    ),
    "a recorded search goes without a trial whose record is damaged": Mutation(
        "qpruner/pipeline/search.py",
        "if not all(trial.is_over for trial in own) and matching(context.run_dir, stage, SearchRecord):",
        "if False:",
        f"{SEARCH}::test_a_trial_whose_record_is_damaged_after_the_search_is_run_again",
    ),
    "a finalist's damaged checkpoint is confirmed": Mutation(
        "qpruner/pipeline/search.py",
        "if not [trial for trial in finalists if begin_anew_if_damaged(job.trials, trial, tell)]:",
        "if True:",
        f"{SEARCH}::test_a_finalists_checkpoint_with_a_flipped_bit_is_not_what_is_confirmed",
    ),
    "a Ray that does not come up in time is given up at once": Mutation(
        CLUSTER,
        "MAX_STARTS = 3\n",
        "MAX_STARTS = 1\n",
        "tests/execution/test_local_ray.py::test_a_ray_that_comes_up_at_the_second_start_is_worked_with",
    ),
    "finalists are scored anew by every command": Mutation(
        "qpruner/pipeline/search.py",
        "elif kept and kept.digest == digests[position]:",
        "elif False:",
        f"{SEARCH}::test_what_finalists_scored_before_the_driver_was_killed_is_kept",
    ),
    "a finalist's damaged score ends the search": Mutation(
        "qpruner/pipeline/search.py",
        """        return read_json(path, KeptScore)
    except CorruptFile as error:
""",
        """        return read_json(path, KeptScore)
    except ZeroDivisionError as error:
""",
        f"{SEARCH}::test_a_finalists_damaged_score_is_made_again_and_no_other",
    ),
    "the searcher does not hear of what diverged": Mutation(
        "qpruner/records.py",
        'return self.failure in ("infeasible", "diverged")',
        "return False",
        f"{SEARCH}::test_of_plans_that_diverge_the_searcher_hears_and_keeps_away",
    ),
    "memory that ends is an error like any other": Mutation(
        "qpruner/memory.py",
        "return named or bool(SHORTAGE.search(str(error)))",
        "return False",
        f"{SEARCH}::test_a_trial_that_runs_out_of_memory_goes_on_with_less_of_it_or_is_infeasible",
    ),
    "what the kernel kills for memory is lost": Mutation(
        DRIVER,
        "if pulse and pulse.node == node and (kernel_kills_on(node) or 0) > (pulse.kernel_kills or 0):",
        "if False:",
        f"{SEARCH}::test_a_trial_that_the_kernel_kills_for_memory_goes_on_with_less_of_it",
    ),
    "what is killed for memory is given up before it is down to one row": Mutation(
        DRIVER,
        '        return record.model_copy(update={"micro_batch_size": smaller})\n',
        '        record = record.model_copy(update={"micro_batch_size": smaller})\n',
        f"{TRIALS}::test_a_trial_killed_for_memory_goes_down_to_one_row_before_its_plan_is_infeasible",
    ),
    "a death of another cause counts as one for want of memory": Mutation(
        DRIVER,
        '_with_kill(record, "memory_kills", "infeasible", reason)',
        '_with_kill(record, "kills", "infeasible", reason)',
        f"{TRIALS}::test_deaths_of_another_cause_are_no_sign_that_a_plan_is_too_large",
    ),
    "all pay for the one that Ray killed for memory": Mutation(
        "qpruner/search/tune/__init__.py",
        "tune_controller.RayActorManager = ActorManager\n",
        "",
        f"{SEARCH}::test_a_machine_out_of_memory_costs_one_trial_its_worker_and_nothing_else",
    ),
    "nobody waits for a full disk": Mutation(
        "qpruner/patience.py",
        "if waited >= limit:",
        "if True:",
        f"{SEARCH}::test_a_disk_that_fills_up_is_waited_for_and_then_the_search_ends_with_the_remedy",
    ),
    "nobody waits for a storage that is away": Mutation(
        "qpruner/patience.py",
        "if number in AWAY:",
        "if False:",
        f"{SEARCH}::test_a_storage_that_is_away_for_a_while_is_waited_for",
    ),
    "a storage that is away when a trial begins ends the search": Mutation(
        "qpruner/execution/testimony.py",
        "        patiently(look_again, folder)\n",
        "        look_again()\n",
        f"{SEARCH}::test_a_trial_that_begins_while_the_storage_is_away_waits_for_it",
    ),
    "a trial that misses its files while the storage is away has failed": Mutation(
        "qpruner/search/tune/worker.py",
        "if smaller is None and self._was_away(error):",
        "if False:",
        f"{ENDS}::test_a_trial_that_misses_its_files_while_the_storage_is_away_goes_on_once_it_is_back",
    ),
    "a long attempt is repeated for ever": Mutation(
        "qpruner/patience.py",
        "limit and (goes_on or long_attempts < LONG_ATTEMPTS)",
        "limit",
        f"{PATIENCE}::test_what_is_slow_by_itself_is_not_tried_for_ever",
    ),
    "a row that another machine cannot see is set aside": Mutation(
        JOBS,
        "not run.is_at_uri and isinstance(_recorded(row), CandidateRecord)",
        "False",
        "tests/pipeline/test_finish.py::test_a_row_that_is_whole_seen_from_here_is_not_set_aside",
    ),
    "a Ray of our own takes an address that others reach": Mutation(
        CLUSTER,
        "    with _without(OF_A_CLUSTER), _on_loopback():\n",
        "    with _without(OF_A_CLUSTER):\n",
        "tests/execution/test_cluster.py::test_a_ray_of_our_own_listens_on_this_machine_alone",
    ),
    "a trial's rows must be there at once": Mutation(
        "qpruner/data.py",
        "folder, was_there=True)\n    except",
        "folder)\n    except",
        "tests/test_patience.py::test_what_a_trial_reads_when_it_begins_is_waited_for",
    ),
    "a trial's tensors must be there at once": Mutation(
        "qpruner/quantization/bank.py",
        "path, was_there=True)\n            if whole",
        "path)\n            if whole",
        "tests/test_patience.py::test_what_a_trial_reads_when_it_begins_is_waited_for",
    ),
    "a search ends with the trials of an empty folder": Mutation(
        "qpruner/search/tune/__init__.py",
        "    wait_for_storage(job.trials, job.search)\n    recorded",
        "    recorded",
        f"{TRIALS}::test_a_search_that_ends_while_the_storage_is_away_does_not_end_without_its_trials",
    ),
    "finished trials are not recalled": Mutation(
        "qpruner/search/tune/resume.py",
        "            ledger.recall(suggestion, rungs, ending_of(record))\n    return",
        "            pass\n    return",
        f"{SEARCH}::test_a_new_head_goes_on_from_what_the_run_folder_holds",
    ),
    "trials under way are not taken up": Mutation(
        "qpruner/search/tune/resume.py",
        "            ledger.resume(suggestion, rungs)\n",
        "            pass\n",
        f"{STORE}::test_a_killed_run_is_taken_up_on_an_empty_machine_and_ends_as_if_nothing_had_happened",
    ),
    "a model that is cut again otherwise keeps the bank": Mutation(
        "qpruner/pipeline/prune.py",
        '{"weights": _weights_digest(job.scratch)}',
        '{"weights": ""}',
        f"{STAGES}::test_a_model_that_is_cut_again_otherwise_gets_a_bank_of_its_own",
    ),
    "damaged scores end the command": Mutation(
        "qpruner/pipeline/compress.py",
        "            where = set_aside(file, context.run_dir.root)\n",
        "            raise\n",
        "tests/sensitivity/test_methods.py::test_damaged_scores_are_set_aside_and_made_anew_and_no_others",
    ),
    "scores of a command that was cut off are made again": Mutation(
        "qpruner/pipeline/compress.py",
        "measured_methods), goes_on=True)",
        "measured_methods))",
        "tests/sensitivity/test_methods.py::test_scores_that_an_interrupted_command_made_are_not_made_again",
    ),
    "what a command that was cut off had built of a bank is built again": Mutation(
        "qpruner/pipeline/bank.py",
        "            write_index()\n",
        "",
        f"{BANK_STAGE}::test_groups_that_an_interrupted_command_built_are_not_built_again",
    ),
    "what a command that was cut off built for another bank comes into this one": Mutation(
        "qpruner/pipeline/bank.py",
        "        remove(scratch / name)\n",
        "        pass\n",
        f"{BANK_STAGE}::test_what_an_interrupted_command_left_for_another_bank_harms_none",
    ),
    "a bank without its index is built again": Mutation(
        "qpruner/pipeline/bank.py",
        "        index = _index_of(record, stage)\n",
        '        return context.forget("bank")\n',
        f"{BANK_STAGE}::test_an_index_that_cannot_be_read_is_named_and_made_again_from_the_record",
    ),
    "a bank's damaged object is taken as it is": Mutation(
        "qpruner/quantization/bank.py",
        "            if fetch_file(path, aside, on_piece) != sha256:",
        "            if fetch_file(path, aside, on_piece) != sha256 and False:",
        f"{STORE}::test_of_a_bank_with_a_damaged_object_that_object_alone_is_built_again",
    ),
    "a server that is away is an error at once": Mutation(
        "qpruner/patience.py",
        "if number in AWAY:",
        "if False:",
        f"{STORE}::test_a_server_that_is_away_is_waited_for_and_then_told_of",
    ),
    "folders are not compared with their lists": Mutation(
        "qpruner/mirror.py",
        "        _check_files(listed, folder, on_piece)\n",
        "        pass\n",
        f"{STAGES}::test_a_damaged_model_is_named_and_set_aside_and_it_alone_is_made_again",
    ),
    "folders in a stage's are not compared with their lists": Mutation(
        "qpruner/pipeline/stage.py",
        "for part in (folder, *inner):",
        "for part in (folder,):",
        f"{STAGES}::test_damaged_rows_are_named_and_set_aside_and_they_alone_are_made_again",
    ),
    "objects are compared by who fetches them alone": Mutation(
        "qpruner/mirror.py",
        "            _check_objects(there, folder)\n",
        "            pass\n",
        f"{OBJECTS}::test_an_object_that_changed_after_it_was_put_is_named_where_a_copy_is_whole",
    ),
    "a damaged final model is recorded all the same": Mutation(
        FINISH,
        "    if not _is_there(context, final):",
        "    if False:",
        "tests/pipeline/test_finish.py::test_the_winner_is_trained_and_scored_once",
    ),
    "a comparison begins before its winner is reported": Mutation(
        "qpruner/pipeline/comparison.py",
        '        context.emit(Message("comparison", f"the winner is done: {report_unfinished(context.run_dir)}"))\n',
        "",
        "tests/test_run.py::test_a_comparison_is_added_to_a_finished_run_and_may_be_killed",
    ),
    "the record of one final model stands while another is written": Mutation(
        FINISH,
        '        context.forget("finetune")  # what it vouches for is about to be written over\n',
        "",
        "tests/pipeline/test_finish.py::test_the_winner_is_trained_and_scored_once",
    ),
    "a fine-tune that was cut off goes on beside the one that took over": Mutation(
        "qpruner/finetune.py",
        "            self.before_save()\n",
        "            pass\n",
        f"{AT_URI}::test_a_fine_tune_that_was_cut_off_and_comes_back_writes_nothing_more",
    ),
    "a fine-tune ends at a damaged checkpoint": Mutation(
        "qpruner/candidates.py",
        "        except CorruptFile:\n            continue\n",
        "        except FileNotFoundError:\n            continue\n",
        f"{AT_URI}::test_a_damaged_checkpoint_of_a_fine_tune_is_not_gone_on_from",
    ),
    "every command meets the same damaged adapter": Mutation(
        JOBS,
        "if not (error.path and error.path.is_relative_to(run.candidates)):",
        "if True:",
        f"{AT_URI}::test_a_row_whose_adapter_is_damaged_is_set_aside_by_whoever_meets_that",
    ),
    "a final model that lacks an object is taken for whole": Mutation(
        FINISH,
        "missing = listed.sha256.keys() - files_in(final).keys()",
        "missing = set[str]()",
        f"{AT_URI}::test_a_final_model_of_which_an_object_is_gone_is_written_again",
    ),
    "a fine-tune that ended takes one more step": Mutation(
        "qpruner/finetune.py",
        "if state and state.global_step == state.max_steps:",
        "if False:",
        "tests/test_candidates.py::test_a_fine_tune_that_ended_and_was_not_recorded_takes_no_step_again",
    ),
    "checkpoints of what is recorded are kept": Mutation(
        JOBS,
        "            remove(job.checkpoints)\n",
        "",
        "tests/pipeline/test_finish.py::test_an_interrupted_comparison_goes_on_with_what_is_left",
    ),
    "what is no number is trained on": Mutation(
        "qpruner/finetune.py",
        "if not math.isfinite(self.train_loss) or not math.isfinite(norm):",
        "if False:",
        f"{SEARCH}::test_of_plans_that_diverge_the_searcher_hears_and_keeps_away",
    ),
    "a checkpoint that is out of sight is missing": Mutation(
        "qpruner/search/trial_records.py",
        "    read_trial(folder, record.index)\n    return folder_digests(checkpoint)\n",
        "    return folder_digests(checkpoint)\n",
        f"{TRIALS}::test_a_checkpoint_that_cannot_be_seen_while_the_storage_is_away_is_not_missing",
    ),
    "a trial whose record is out of sight begins anew": Mutation(
        DRIVER,
        "if suggestion.index in self._recorded:",
        "if False:",
        f"{TRIALS}::test_a_trial_that_is_handed_out_again_while_the_storage_is_away_keeps_its_rungs",
    ),
    "a damaged record stays where it is": Mutation(
        "qpruner/search/trial_records.py",
        "if isinstance(record, CorruptFile):",
        "if False:",
        f"{TRIALS}::test_a_damaged_record_is_set_aside_and_only_its_trial_is_run_again",
    ),
    "a record that was changed is read as it is": Mutation(
        "qpruner/rundir.py",
        "if told != digest_of(found):",
        "if False:",
        f"{TRIALS}::test_a_damaged_record_is_set_aside_and_only_its_trial_is_run_again",
    ),
    "whoever does as told about a damaged record loses its plan": Mutation(
        "qpruner/pipeline/stage.py",
        'if parts[0] == "trials":',
        "if False:",
        f"{STAGES}::test_what_a_search_sets_aside_by_itself_nobody_is_told_to_delete",
    ),
    "one look for a file that fails ends the search": Mutation(
        "qpruner/rundir.py",
        "return patiently(there.is_object if there else is_file, path)",
        "return there.is_object() if there else is_file()",
        f"{PATIENCE}::test_whether_there_is_a_file_is_asked_again_until_the_storage_answers",
    ),
    "a damaged record costs its plan": Mutation(
        "qpruner/search/trial_records.py",
        "    begin_trial(folder, suggested)\n",
        "",
        f"{TRIALS}::test_a_damaged_record_is_set_aside_and_only_its_trial_is_run_again",
    ),
    "of a plan that is handed out there is no copy": Mutation(
        DRIVER,
        "            begin_trial(self._job.trials, record)\n",
        "            write_trial(self._job.trials, record)\n",
        f"{TRIALS}::test_a_plan_that_was_handed_out_outlives_its_record",
    ),
    "a dead driver's lock is for ever": Mutation(
        "qpruner/runlock.py",
        'return None if _start_of(holder.pid) == holder.started else "that process is dead"',
        "return None",
        "tests/test_runlock.py::test_a_driver_that_was_killed_holds_nothing",
    ),
    "records are written where they are read": Mutation(
        "qpruner/rundir.py",
        '        aside.write_text(text, encoding="utf-8")\n        sync(aside)\n        rename(aside, path)\n',
        '        path.write_text(text, encoding="utf-8")\n',
        "tests/test_rundir.py::test_a_reader_never_sees_half_a_record",
    ),
    "a record has its name before it is on the disk": Mutation(
        "qpruner/rundir.py",
        "        sync(aside)\n",
        "",
        "tests/test_rundir.py::test_a_record_is_on_the_disk_before_it_has_its_name",
    ),
    "a folder has its name before it is on the disk": Mutation(
        "qpruner/rundir.py",
        "            sync(path)\n",
        "            pass\n",
        "tests/test_rundir.py::test_a_folder_is_on_the_disk_before_it_has_its_name",
    ),
    "a folder's list has its name before it is on the disk": Mutation(
        "qpruner/rundir.py",
        "            sync(list_beside(scratch))\n",
        "            pass\n",
        "tests/test_rundir.py::test_a_folder_is_on_the_disk_before_it_has_its_name",
    ),
    "a folder that was renamed without an answer is deleted": Mutation(
        "qpruner/rundir.py",
        "        if scratch.exists():  # else it lies at its target by now\n",
        "        if True:\n",
        f"{PATIENCE}::test_a_folder_of_whose_renaming_no_answer_came_is_published",
    ),
    "what was renamed without an answer is missing": Mutation(
        "qpruner/mirror.py",
        "    except FileNotFoundError:\n        target.stat()\n",
        "    except FileNotFoundError:\n        raise\n",
        f"{PATIENCE}::test_a_record_of_whose_renaming_no_answer_came_is_written",
    ),
    "nothing is ever on the disk for sure": Mutation(
        "qpruner/mirror.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        "tests/test_rundir.py::test_a_record_is_on_the_disk_before_it_has_its_name",
    ),
    "nobody is told that a search was resumed": Mutation(
        "qpruner/report/outcome.py",
        "if search.sessions > 1:",
        "if False:",
        "tests/test_run.py::test_killed_twice_and_repeated_gives_the_same",
    ),
    "a trial out of memory gets no second try": Mutation(
        "qpruner/search/tune/job.py",
        "range(present // 2, 0, -1)",
        "range(0)",
        f"{SEARCH}::test_a_trial_that_runs_out_of_memory_goes_on_with_less_of_it_or_is_infeasible",
    ),
    "a search without its storage ends as if it were over": Mutation(
        "qpruner/search/tune/__init__.py",
        "    if mendable:\n",
        "    if False:\n",
        f"{SEARCH}::test_a_disk_that_fills_up_is_waited_for_and_then_the_search_ends_with_the_remedy",
    ),
    "a trial does without the GPU that it holds": Mutation(
        "qpruner/execution/testimony.py",
        "    _refuse(trouble or unseen_gpus())\n",
        "    _refuse(trouble)\n",
        f"{LATE}::test_a_node_that_joins_late_and_differs_is_named_and_takes_no_retry",
    ),
    "a task does without the GPU that it holds": Mutation(
        CLUSTER,
        "        cloudpickle.loads(check_node)()\n",
        "",
        f"{LATE}::test_all_work_that_holds_a_gpu_which_torch_does_not_see_is_refused",
    ),
    "a task is done on a node that differs": Mutation(
        CLUSTER,
        "        cloudpickle.loads(check_node)()\n",
        "",
        f"{LATE}::test_no_work_is_done_on_a_node_that_joins_late_and_differs",
    ),
    "the workshop is opened on a node that differs": Mutation(
        "qpruner/execution/workshop.py",
        "                cloudpickle.loads(check_node)()\n",
        "",
        f"{LATE}::test_no_work_is_done_on_a_node_that_joins_late_and_differs",
    ),
    "a group trains on a node that differs": Mutation(
        "qpruner/execution/group.py",
        "            ray.get([worker.actor.execute.remote(check) for worker in workers])\n",
        "            pass\n",
        f"{LATE}::test_no_work_is_done_on_a_node_that_joins_late_and_differs",
    ),
    "what joins a cluster after the look is taken for alike": Mutation(
        "qpruner/pipeline/context.py",
        "        if not self.address:\n            return packed_check_of_gpus()\n",
        "        return packed_check_of_gpus()\n",
        f"{LATE}::test_the_first_work_of_a_command_is_not_done_on_a_node_that_came_after_the_look",
    ),
    "what a node wrote to its own disk is committed": Mutation(
        "qpruner/pipeline/prune.py",
        "        check_arrived(scratch)\n",
        "",
        f"{LATE}::test_what_a_node_wrote_to_its_own_disk_is_not_taken_for_the_runs",
    ),
    "a machine's death is held against the work on it": Mutation(
        CLUSTER,
        "if not isinstance(death, NodeDiedError) and (node is None or stays(node)):",
        "if True:",
        f"{WORK}::test_work_goes_on_elsewhere_however_many_machines_go",
    ),
    "a machine's death is held against a group": Mutation(
        "qpruner/execution/group.py",
        "raise NodeDiedError(str(cause)) from error",
        "raise cause from error",
        f"{WORK}::test_work_goes_on_elsewhere_however_many_machines_go",
    ),
    "a task whose worker is killed ends the command": Mutation(
        CLUSTER,
        "                waiting.append((position, jobs[position]))\n",
        "                raise\n",
        f"{WORK}::test_a_task_whose_worker_is_killed_is_run_again",
    ),
    "a workshop that is killed ends the command": Mutation(
        "qpruner/execution/workshop.py",
        "                line = deaths.count(0, self._node, error)\n",
        "                raise\n",
        f"{WORK}::test_a_worker_that_is_killed_has_its_work_begun_again",
    ),
    "a workshop that Ray kills for memory ends the command": Mutation(
        "qpruner/execution/workshop.py",
        "except (OutOfMemoryError, RayActorError) as error:",
        "except RayActorError as error:",
        f"{WORK}::test_a_worker_that_ray_kills_for_memory_has_its_work_begun_again",
    ),
    "a fine-tune of days may lose three processes": Mutation(
        CLUSTER,
        "if left != self._seen.get(position):",
        "if False:",
        f"{WORK}::test_deaths_between_which_a_task_got_on_are_forgiven_it",
    ),
    "a trial that loads is taken for one that hangs": Mutation(
        "qpruner/search/trial.py",
        "fetch(materials.checkpoint, moved)",
        "fetch(materials.checkpoint)",
        f"{STAGES}::test_a_trial_tells_of_all_that_it_loads_before_its_first_pass",
    ),
    "a trial that waits for another's files is taken for one that hangs": Mutation(
        "qpruner/mirror.py",
        "            on_piece()\n            time.sleep(WAITING_SECONDS)\n",
        "            time.sleep(WAITING_SECONDS)\n",
        f"{OBJECTS}::test_whoever_waits_for_a_folder_hears_of_every_piece",
    ),
    "what hung at its start is given up": Mutation(
        "qpruner/search/tune/resume.py",
        "record.is_tried_again",
        "record.can_be_mended",
        f"{TRIALS}::test_what_hung_before_its_first_rung_is_tried_again_by_the_next_command",
    ),
    "a machine's own full disk is taken for the run's": Mutation(
        "qpruner/objects.py",
        "            error.filename = str(file)\n",
        "",
        f"{BANK}::test_a_machine_whose_own_disk_is_full_is_told_so_and_keeps_no_half_of_a_file",
    ),
    "half a copy stays on a full disk": Mutation(
        "qpruner/rundir.py",
        "        to.unlink(missing_ok=True)\n",
        "",
        f"{BANK}::test_a_machine_whose_own_disk_is_full_is_told_so_and_keeps_no_half_of_a_file",
    ),
    "a permission that is missing is taken for a store that is away": Mutation(
        "qpruner/objects.py",
        "|UNAUTHENT|PERMISSION_DENIED",
        "|UNAUTHENT",
        f"{OBJECTS}::test_what_googles_storage_refuses_is_told_and_no_more_is_asked_for_than_objects",
    ),
    "more is asked for than a bucket's objects": Mutation(
        "qpruner/objects.py",
        "self._system.get_file_info(FileSelector(self._path))",
        "self._system.get_file_info(self.bucket)",
        f"{OBJECTS}::test_what_googles_storage_refuses_is_told_and_no_more_is_asked_for_than_objects",
    ),
    "what a run holds is to be paid for again": Mutation(
        "qpruner/pipeline/disk.py",
        "            size = sum(round(sizes[name] * (1 - shares[name])) for name in names)\n",
        "            size = sum(sizes[name] for name in names)\n",
        f"{DISK}::test_what_a_run_holds_already_is_paid_for",
    ),
    "a finished run asks for room": Mutation(
        "qpruner/pipeline/disk.py",
        "            size = sum(round(sizes[name] * (1 - shares[name])) for name in names)\n",
        "            size = sum(sizes[name] for name in names)\n",
        "tests/test_run.py::test_a_finished_run_asks_for_no_more_room",
    ),
    "what a killed stage left is to be paid for again": Mutation(
        "qpruner/pipeline/disk.py",
        "    places = [run.scratch_path(stage)]\n",
        "    places: list[Path] = []\n",
        f"{DISK}::test_what_a_killed_stage_left_is_paid_for",
    ),
    "a damaged trial record keeps a command from looking at what it holds": Mutation(
        "qpruner/search/trial_records.py",
        "return [record for record in for_each(_record_or_error, _paths(folder)) if isinstance(record, TrialRecord)]",
        "return read_trials(folder)",
        f"{DISK}::test_a_damaged_trial_record_is_no_reason_to_look_no_further",
    ),
    "a machine's copies of a run at a URI are to be paid for again": Mutation(
        "qpruner/pipeline/disk.py",
        "        left += max(0, size - _bytes({file for name in names for file in _held(context, name, found)}))\n",
        "        left += size\n",
        f"{AT_URI}::test_room_is_asked_for_what_is_not_on_this_machine_yet",
    ),
    "two drivers share a run": Mutation(
        "qpruner/runlock.py",
        "            if why is None:\n",
        "            if False:\n",
        "tests/test_runlock.py::test_the_second_driver_is_refused_with_the_firsts_host_and_pid",
    ),
    "who slept through another's whole work goes on": Mutation(
        "qpruner/runlock.py",
        "if lock.is_gone() else None",
        "if False else None",
        "tests/test_runlock.py::test_who_slept_through_all_that_another_did_on_its_run_ends",
    ),
    "who lost its run makes a lock to give it up": Mutation(
        "qpruner/runlock.py",
        "            if lock.holder() == me:\n                with lock.alone():",
        "            if True:\n                with lock.alone():",
        "tests/test_runlock.py::test_who_slept_through_all_that_another_did_on_its_run_ends",
    ),
    "a storage that is away ends its driver": Mutation(
        "qpruner/runlock.py",
        "return self._path.with_name(RUN_ID).exists() and not self._path.exists()",
        "return True",
        "tests/test_runlock.py::test_the_heartbeat_goes_on_and_who_lost_the_run_ends",
    ),
    "a checkpoint that a killed worker left stays with its trial": Mutation(
        DRIVER,
        "            remove_old_checkpoints(self._job.trials, [record])\n",
        "            pass\n",
        f"{TRIALS}::test_of_a_trial_that_is_over_the_last_checkpoint_alone_is_kept",
    ),
    "a checkpoint that was left when all was killed stays": Mutation(
        "qpruner/search/tune/resume.py",
        "    remove_old_checkpoints(job.trials, [record for record in recorded if record.is_over])\n",
        "",
        f"{TRIALS}::test_of_a_trial_that_is_over_the_last_checkpoint_alone_is_kept",
    ),
    "a trial that failed keeps what it left": Mutation(
        DRIVER,
        'if record.failure != "hung":',
        'if record.status != "failed":',
        f"{TRIALS}::test_of_a_trial_that_failed_the_last_checkpoint_alone_is_kept[lost]",
    ),
    "checkpoints are taken from a worker that hung": Mutation(
        DRIVER,
        'if record.failure != "hung":',
        "if True:",
        f"{TRIALS}::test_of_a_trial_that_failed_the_last_checkpoint_alone_is_kept[hung]",
    ),
    "a driver that slept writes over another's trials": Mutation(
        DRIVER,
        "if exists(path):",
        "if False:",
        f"{TRIALS}::test_a_driver_that_slept_hands_out_no_number_that_another_has_recorded",
    ),
    "a driver that slept counts another's trials as its own": Mutation(
        "qpruner/search/trial_records.py",
        "if session is not None and clock.sessions > session:",
        "if False:",
        f"{TRIALS}::test_a_driver_that_slept_changes_no_trial_that_another_went_on_with",
    ),
    "who lost its run tells how it ended": Mutation(
        "qpruner/pipeline/progress.py",
        "if not self._is_ours():",
        "if False:",
        f"{PROGRESS}::test_a_command_whose_run_another_took_over_tells_nothing_more",
    ),
    "who lost its run reports on it": Mutation(
        "qpruner/pipeline/__init__.py",
        "if progress.is_told and not is_away and is_ours():",
        "if progress.is_told and not is_away:",
        f"{PROGRESS}::test_a_command_whose_run_another_took_over_leaves_what_that_one_tells",
    ),
    "who lost its run reports on it all the same, since it had done all that was asked": Mutation(
        "qpruner/pipeline/__init__.py",
        'if until != "report" and is_ours() and (',
        'if until != "report" and (',
        f"{PROGRESS}::test_who_lost_its_run_when_its_last_stage_was_recorded_reports_nothing",
    ),
    "who lost its run begins a stage": Mutation(
        "qpruner/pipeline/stage.py",
        "        context.check_ours(stage.name)\n        scratch",
        "        scratch",
        f"{PROGRESS}::test_a_stage_whose_run_another_took_over_leaves_what_that_one_recorded[before its work]",
    ),
    "who lost its run records a stage": Mutation(
        "qpruner/pipeline/stage.py",
        "        context.check_ours(stage.name)\n        run.commit",
        "        run.commit",
        f"{PROGRESS}::test_a_stage_whose_run_another_took_over_leaves_what_that_one_recorded[in its work]",
    ),
    "who lost its run drops a record": Mutation(
        "qpruner/pipeline/context.py",
        "        self.check_ours(stage)\n",
        "",
        f"{PROGRESS}::test_a_stage_whose_run_another_took_over_leaves_what_that_one_recorded",
    ),
    "stages are not told whose the run is": Mutation(
        "qpruner/pipeline/__init__.py",
        ", inspection, is_ours=is_ours)",
        ", inspection)",
        f"{PROGRESS}::test_a_command_whose_run_another_took_over_leaves_what_that_one_tells",
    ),
    "a machine's copy is whole for ever": Mutation(
        "qpruner/mirror.py",
        "            _check_files(wanted, folder, on_piece)\n",
        "            pass\n",
        f"{OBJECTS}::test_a_copy_that_is_damaged_on_its_machine_is_fetched_again",
    ),
    "a machine's processes compare a copy one after the other": Mutation(
        "qpruner/mirror.py",
        "with one_at_a_time(folder, on_piece, fcntl.LOCK_SH):",
        "with one_at_a_time(folder, on_piece):",
        f"{OBJECTS}::test_a_copy_is_compared_once_a_process_while_others_do_so_too",
    ),
    "a copy's list says so before it is on the disk": Mutation(
        "qpruner/mirror.py",
        "        sync(path)\n",
        "        pass\n",
        f"{OBJECTS}::test_a_copy_is_on_the_disk_before_its_list_says_so",
    ),
    "a key with a slash in it is taken for a bucket": Mutation(
        "qpruner/objects.py",
        'for sign in "@:")',
        'for sign in "@")',
        f"{OBJECTS}::test_credentials_in_a_uri_are_refused_and_not_repeated",
    ),
    "an endpoint's password is taken for its address": Mutation(
        "qpruner/objects.py",
        ' or "@" in "".join(options.values())',
        "",
        f"{OBJECTS}::test_credentials_in_a_uri_are_refused_and_not_repeated",
    ),
    "a storage that is away when a run is taken is a defect": Mutation(
        "qpruner/runlock.py",
        "patiently(lambda: _taken(lock, me, tell, STALE_BEATS * heartbeat_seconds), root / NAME, seconds=0.0):",
        "_taken(lock, me, tell, STALE_BEATS * heartbeat_seconds):",
        f"{OBJECTS}::test_a_store_that_is_away_when_the_run_is_taken_is_told_with_its_remedy",
    ),
    "the job after one whose machine was lost is refused": Mutation(
        "qpruner/runlock.py",
        "if holder.machine == me.machine or (seen and found != seen):",
        "if True:",
        "tests/test_runlock.py::test_a_driver_that_has_just_died_on_another_machine_is_waited_for_and_then_taken_over_from",
    ),
    "a driver that lives on another machine is waited for, for ever": Mutation(
        "qpruner/runlock.py",
        "if holder.machine == me.machine or (seen and found != seen):",
        "if holder.machine == me.machine:",
        "tests/test_runlock.py::test_a_driver_that_lives_on_another_machine_is_refused_at_its_next_heartbeat",
    ),
    "nobody is told of whom a quiet command waits for": Mutation(
        "qpruner/terminal.py",
        "if isinstance(event, events.Message) and event.stage == events.COMMAND:",
        "if False:",
        "tests/test_runlock.py::test_the_command_is_refused_with_exit_code_2",
    ),
    "a pipe hears nothing while nothing is counted": Mutation(
        "qpruner/terminal.py",
        "            threading.Thread(target=self._break_silence, daemon=True).start()\n",
        "            pass\n",
        "tests/report/test_terminal.py::test_a_pipe_is_told_now_and_then_how_far_a_long_step_is",
    ),
    "a row that has no folder yet counts no answers": Mutation(
        "qpruner/candidates.py",
        "path.parent.mkdir(exist_ok=True)",
        "pass",
        "tests/test_candidates.py::test_answers_are_counted_between_batches_and_of_a_row_without_a_folder",
    ),
    "a deterministic search looks at what happens to be there": Mutation(
        "qpruner/search/searchers.py",
        "if timetable is None or timetable.is_known(*key)",
        "if True",
        TIMED,
    ),
    "in a deterministic search ASHA compares with what happens to be there": Mutation(
        "qpruner/search/searchers.py",
        "and self.timetable.is_known(index, step, to=trial)",
        "",
        TIMED,
    ),
    "a deterministic search takes what fails to have ended with its last rung": Mutation(
        "qpruner/search/searchers.py",
        'has_failed=ending != "scored"',
        "has_failed=False",
        TIMED,
    ),
    "a deterministic search that goes on has forgotten when trials began": Mutation(
        "qpruner/search/searchers.py",
        "self.timetable.take_up(suggestion.index, suggestion.begun)",
        "pass",
        TAKEN_UP,
    ),
    "a deterministic search takes the last rung of what goes on for decided": Mutation(
        "qpruner/search/searchers.py",
        "        for rung in rungs[:-1]:\n",
        "        for rung in rungs:\n",
        TAKEN_UP,
    ),
    "a deterministic search proposes before it knows": Mutation(
        DRIVER,
        "(len(self._live) >= self._room() or self._ledger.waits)",
        "len(self._live) >= self._room()",
        "tests/search/test_timetable.py::test_the_same_seed_and_as_many_workers_give_the_same_plans",
    ),
}


@functools.cache
def passes(test: str, mutation: Mutation | None = None) -> bool:
    """Whether a test passes in a copy of the checkout, without the handling of a fault or as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", ".*_cache", "__pycache__"))
        if mutation:
            path = copy / mutation.file
            path.write_text(path.read_text().replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "slow or not slow", test]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest {test} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    num_unproven = 0
    for name in names or list(MUTATIONS):
        started, mutation = time.monotonic(), MUTATIONS[name]
        # A test that fails in the copy anyway has caught nothing.
        verdict = "SURVIVED" if passes(mutation.test, mutation) else "caught" if passes(mutation.test) else "BROKEN"
        num_unproven += verdict != "caught"
        print(f"{verdict:8s}  {name}  ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if num_unproven else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
