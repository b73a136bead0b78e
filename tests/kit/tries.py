"""Which test of the kit is meant for which wrong part; `honest` runs the same tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qtasks_conformance.contracts.querying import FILTERS
from qtasks_conformance.rig import SCRIPTS
from qtasks_core import Backend, Broker, Storage
from tests.kit import wrong_backends as backends
from tests.kit import wrong_brokers as brokers
from tests.kit import wrong_calls as calls
from tests.kit import wrong_processes as processes
from tests.kit import wrong_queues as queues
from tests.kit import wrong_shared as shared
from tests.kit import wrong_storages as storages

Contract = Literal["broker", "storage", "pair", "backend"]
Wrong = type[Broker] | type[Storage] | type[Backend] | tuple[str, ...]


@dataclass(frozen=True)
class Try:
    """A wrong part (or a server that forgets) and the tests that must find it out."""

    wrong: Wrong
    contract: Contract
    tests: tuple[str, ...]

    @property
    def honest(self) -> str:
        """The class that runs the same tests on honest parts."""
        return f"TestHonest{'Process' if self.in_processes else ''}_{self.contract}"

    @property
    def in_processes(self) -> bool:
        """Whether other processes are real ones, over a file, and not instances in memory."""
        return isinstance(self.wrong, type) and self.wrong.__module__ == processes.__name__

    @property
    def on_trial(self) -> str:
        """The class that runs the tests on the wrong part."""
        return f"Test{self.name}_{self.contract}"

    @property
    def name(self) -> str:
        """What the part does wrongly."""
        if isinstance(self.wrong, tuple):
            return "Forgets" + "And".join(what.capitalize() for what in self.wrong)
        return self.wrong.__name__


def of_broker(wrong: Wrong, *tests: str) -> Try:
    return Try(wrong, "broker", tests)


def of_storage(wrong: Wrong, *tests: str) -> Try:
    return Try(wrong, "storage", tests)


def of_pair(wrong: Wrong, *tests: str) -> Try:
    return Try(wrong, "pair", tests)


def of_backend(wrong: type[Backend], *tests: str) -> Try:
    return Try(wrong, "backend", tests)


def in_scripts(test: str, *scripts: str) -> tuple[str, ...]:
    """Return the ids of a test that runs once a script."""
    return tuple(f"{test}[{escaped(script)}]" for script in scripts)


def escaped(text: str) -> str:
    """Return text as pytest writes it into the id of a test."""
    return text.encode("unicode_escape").decode("ascii")


TRIES = (
    of_backend(backends.StoresInOnePlace, "test_storages_of_other_urls_share_nothing",
               "test_a_url_that_leads_nowhere_is_told[storage]"),
    of_backend(backends.PublishesInOnePlace, "test_brokers_of_other_urls_share_nothing",
               "test_a_url_that_leads_nowhere_is_told[broker]"),
    of_backend(backends.StoresForItself, "test_both_halves_work_together"),
    of_backend(backends.IsOfAnotherVersion, "test_the_backend_is_found"),
    of_backend(backends.SwapsItsHalves, "test_the_backend_is_found"),
    of_backend(backends.TakesAnyOption, "test_an_option_that_does_not_exist_is_refused[broker]",
               "test_an_option_that_does_not_exist_is_refused[storage]"),
    of_backend(backends.ListsNoOptions, "test_an_option_that_does_not_exist_is_refused[storage]"),
    of_backend(backends.ShowsThePassword, "test_a_password_is_not_shown[broker]",
               "test_a_password_is_not_shown[storage]"),
    of_backend(backends.DeclaresThePassword, "test_a_password_is_not_shown[storage]"),
    of_backend(backends.LogsThePassword, "test_a_password_is_not_shown[broker]"),
    of_broker(processes.LosesWithTheProcess, "test_a_killed_receiver_loses_nothing"),
    of_broker(processes.SaysDoneToZombies, "test_a_zombie_is_refused[settle]"),
    of_broker(processes.KeepsZombiesAlive, "test_a_zombie_is_refused[extend]"),
    of_broker(processes.SeesOnlyItself, "test_cancelled_receives_strand_nothing"),
    of_broker(processes.CommandsOnlyItself, "test_a_command_comes_from_another_process"),
    of_broker(processes.DropsForeignBytes, "test_what_cannot_be_decoded_is_delivered_raw"),
    of_broker(processes.ChokesOnForeignBytes, "test_what_cannot_be_decoded_is_delivered_raw"),
    of_storage(processes.ForgetsSpoiltRecords,
               "test_a_record_that_cannot_be_read_hides_no_other"),
    of_storage(processes.ChokesOnSpoiltRecords,
               "test_a_record_that_cannot_be_read_hides_no_other"),
    of_storage(processes.SharesWithItself, "test_one_of_many_has_a_claim",
               "test_a_killed_owner_loses_its_claim", "test_processes_count_together",
               "test_a_value_outlives_its_process", "test_a_watcher_sees_changes",
               "test_processes_append_together", "test_items_outlive_their_process"),
    of_storage(processes.RemembersOnlyItself, "test_get_sees_what_was_saved_elsewhere",
               "test_one_of_two_finals_is_taken"),
    of_storage(processes.HearsOnlyItself, "test_told_while_it_waits[expect]",
               "test_told_while_it_waits[watch]"),
    of_pair(processes.LosesWithTheProcess, "test_many_workers_finish_each_task_once"),
    of_broker(processes.PublishesLater, "test_what_was_published_outlives_its_process"),
    of_broker(processes.DelaysInItsProcess, "test_what_was_published_outlives_its_process"),
    of_broker(processes.RetriesInTwoSteps,
              "test_a_process_killed_while_it_settles_loses_nothing"),
    of_broker(processes.ImportsItsDriverEarly, "test_the_driver_is_imported_late"),
    of_broker(processes.MissesItsDriver, "test_a_missing_driver_is_named"),
    of_storage(processes.SavesLater, "test_what_was_saved_outlives_its_process"),
    of_broker(calls.PublishesTooSoon, "test_a_cancelled_publish_is_made_again"),
    of_broker(calls.CancelsItsNeighbours, "test_a_cancelled_publish_is_made_again"),
    of_broker(calls.SettlesTooSoon, "test_a_cancelled_settle_is_made_again[ack]",
              "test_a_cancelled_settle_is_made_again[retry]",
              "test_a_cancelled_settle_is_made_again[release]"),
    of_broker(calls.RefusesWhatWasCancelled, "test_a_cancelled_settle_is_made_again[ack]"),
    of_broker(calls.LosesWhatItExtends, "test_a_cancelled_extend_is_made_again"),
    of_broker(calls.SubscribesForNobody, "test_a_cancelled_subscribe_holds_nothing"),
    of_broker(calls.ForcesWhatItTook,
              "test_what_a_cancelled_receive_took_is_not_forced_on_the_next"),
    of_broker(calls.DropsWhatItTook, "test_a_fault_inside_a_call_loses_nothing[cancel]",
              "test_a_fault_inside_a_call_loses_nothing[error]"),
    of_broker(calls.DropsWhatItTookOnErrors, "test_a_fault_inside_a_call_loses_nothing[error]"),
    of_broker(calls.RetriesInTwoSteps, "test_a_fault_inside_a_call_loses_nothing[cancel]",
              "test_a_fault_inside_a_call_loses_nothing[error]"),
    of_broker(calls.RetriesWithoutDedup,
              "test_a_retry_that_is_cut_off_leaves_few_messages[cancel]",
              "test_a_retry_that_is_cut_off_leaves_few_messages[error]"),
    of_broker(calls.HidesACancel, "test_a_fault_inside_a_call_loses_nothing[cancel]"),
    of_broker(calls.MakesOneCallAtATime, "test_calls_run_side_by_side"),
    of_broker(calls.TakesAThousand, "test_many_at_once"),
    of_broker(calls.RefusesLargeMessages, "test_the_largest_message_fits"),
    of_broker(calls.OverflowsDelays, "test_the_longest_delay_is_kept"),
    of_broker(calls.ExtendsInItsOwnOrder, "test_extend_answers_for_each"),
    of_broker(calls.SettlesNothingOnceClosed, "test_closing_releases_what_was_not_returned"),
    of_broker(calls.AcknowledgesOnStop, "test_messages_outlive_the_server"),
    of_broker(calls.KeepsCommands, "test_a_command_is_for_who_listens_now"),
    of_broker(calls.IgnoresTransactions, "test_a_transaction_is_joined_or_refused"),
    of_broker(calls.Polls, "test_waiting_costs_nothing"),
    of_broker(calls.SubscribesWhenStopped, "test_it_is_closed_before_and_after"),
    of_broker(calls.WaitsForTheServer, "test_a_waiting_receive_outlives_the_server"),
    of_broker(calls.PublishesWithoutWaiting, "test_a_frozen_server_is_unavailable",
              "test_what_is_published_around_a_freeze_comes"),
    of_broker(calls.HangsWhenFrozen, "test_a_frozen_server_is_unavailable"),
    of_broker(calls.DropsWhatWaits, "test_a_frozen_server_is_unavailable"),
    of_storage(calls.SavesWithoutWaiting, "test_a_frozen_server_is_unavailable",
               "test_what_is_saved_around_a_freeze_is_there"),
    of_storage(calls.FindsNothingWhenFrozen, "test_a_frozen_server_is_unavailable"),
    of_storage(calls.SavesTooSoon, "test_a_cancelled_save_is_made_again"),
    of_storage(calls.ReadsTheAnswerOfAnother, "test_a_cancelled_get_confuses_no_other"),
    of_storage(calls.WatchesTooSoon, "test_a_cancelled_watch_is_made_again"),
    of_storage(calls.SavesOneCallAtATime, "test_calls_run_side_by_side"),
    of_storage(calls.SavesAThousand, "test_many_at_once"),
    of_storage(calls.RefusesLargeRecords, "test_the_largest_record_fits"),
    of_storage(calls.TellsTooSoon, "test_told_of_what_can_be_read"),
    of_storage(calls.WaitsAfterClose, "test_closing_ends_a_waiting_receive[close]",
               "test_closing_ends_a_waiting_receive[stop]"),
    of_storage(calls.LeavesStreamsOfTheExpired, "test_what_expires_takes_its_stream_along"),
    of_storage(calls.HidesItsRetention, "test_a_storage_has_a_retention_of_its_own"),
    of_storage(calls.SavesWhateverTheTransaction, "test_a_transaction_is_joined_or_refused"),
    of_storage(calls.PollsForNews, "test_waiting_costs_nothing"),
    of_storage(calls.WatchesNothingWhenDown, "test_an_inbox_outlives_the_server"),
    of_storage(calls.ReadsWhenDown, "test_records_outlive_the_server"),
    of_pair(calls.LetsPoisonLoop, "test_what_kills_each_time_is_dead_at_last"),
    of_pair(calls.ForgetsWhatHasBegun, "test_what_kills_each_time_is_dead_at_last"),
    of_pair(calls.TakesAttemptsForRepeats, "test_what_no_worker_knows_is_put_back"),
    of_pair(calls.SubmitsTooSoon, "test_a_cancelled_submit_is_made_again[plain]"),
    of_pair(calls.AdmitsOnce, "test_a_cancelled_admit_is_made_again"),
    of_pair(calls.CompletesTooSoon, "test_a_cancelled_complete_is_made_again[ack]",
            "test_a_cancelled_complete_is_made_again[retry]"),
    of_pair(calls.MixesCompletionsUp, "test_each_completion_has_its_own_outcome"),
    of_pair(calls.RunsOnlyWhatIsRecorded,
            "test_a_client_killed_while_submitting_loses_nothing[published-plain]"),
    of_pair(calls.PublishesOnlyWhatIsNew,
            "test_a_client_killed_while_submitting_loses_nothing[recorded-plain]"),
    of_broker(brokers.LosesOnCrash, "test_a_killed_receiver_loses_nothing"),
    of_broker(brokers.SharesTheFirstLease, "test_a_lease_is_the_receivers[short]",
              "test_a_lease_is_the_receivers[long]"),
    of_broker(brokers.StartsEarly, "test_a_published_delay_passes"),
    of_broker(brokers.StartsLate, "test_a_published_delay_passes"),
    of_broker(brokers.RetriesEarly, "test_a_retry_delay_passes"),
    of_broker(brokers.WakesLate, "test_a_new_earliest_wakes_sleepers"),
    of_broker(brokers.IsDeaf, "test_a_waiting_receive_is_woken"),
    of_broker(brokers.DelaysTwice, "test_a_delay_beyond_the_lease_is_delivered_once"),
    of_broker(brokers.StrandsOnCancel, "test_cancelled_receives_strand_nothing",
              "test_what_a_cancelled_receive_took_is_returned_by_the_next",
              "test_closing_after_a_cancel_releases"),
    of_broker(brokers.DoublesOnCancel, "test_cancelled_receives_strand_nothing"),
    of_broker(brokers.ObeysLostLeases, "test_a_zombie_is_refused[settle]",
              "test_a_zombie_is_refused[extend]"),
    of_broker(brokers.ObeysSecretly, "test_a_zombie_is_refused[settle]"),
    of_broker(brokers.ExtendsLostLeases, "test_a_zombie_is_refused[extend]"),
    of_broker(brokers.StealsLeases, "test_an_extended_delivery_stays"),
    of_broker(brokers.SaysDoneToAll, "test_a_zombie_is_refused[settle]"),
    of_broker(brokers.MixesOutcomesUp, "test_a_zombie_is_refused[settle]"),
    of_broker(brokers.SwallowsOutcomes, "test_each_settlement_has_its_own_outcome",
              "test_publish_answers_for_each"),
    of_broker(brokers.ReleasesIntoNothing, "test_each_settlement_has_its_own_outcome"),
    of_broker(brokers.RetriesAgainAndAgain, "test_settling_again_is_done",
              "test_one_of_two_settlements_of_a_delivery_is_obeyed[retry-another]"),
    of_broker(brokers.SaysDoneToWhatDiffers,
              "test_one_of_two_settlements_of_a_delivery_is_obeyed[ack-retry]",
              "test_one_of_two_settlements_of_a_delivery_is_obeyed[retry-ack]",
              "test_one_of_two_settlements_of_a_delivery_is_obeyed[release-ack]"),
    of_broker(brokers.ForgetsWhatItSettled, "test_settling_again_is_done"),
    of_broker(brokers.GivesTooMuch, "test_no_more_is_received_than_wanted"),
    of_broker(brokers.DeliversToBoth, "test_two_receivers_share_a_queue"),
    of_broker(brokers.LosesHeaders, "test_a_message_comes_as_it_went"),
    of_broker(brokers.LosesTheSubmission, "test_a_message_comes_as_it_went"),
    of_broker(brokers.MixesNamespaces, "test_namespaces_never_meet",
              "test_depth_is_of_one_queue_and_namespace", "test_purge_spares_the_neighbours",
              "test_commands_stay_in_their_namespace"),
    of_broker(queues.CountsEverythingAsReady, "test_depth_counts_what_is_where"),
    of_broker(queues.TellsTheAgeOfTheNewest, "test_depth_knows_the_oldest_ready_message"),
    of_broker(queues.CountsAllQueues, "test_depth_is_of_one_queue_and_namespace"),
    of_broker(queues.StaysWithAQueue, "test_no_queue_waits_for_the_backlog_of_another"),
    of_broker(queues.PurgesWhatIsHeld, "test_purge_drops_what_is_not_in_flight"),
    of_broker(queues.PurgesOnlyWhatIsReady, "test_purge_drops_what_is_not_in_flight"),
    of_broker(queues.PurgesAllQueues, "test_purge_spares_the_neighbours"),
    of_broker(queues.TellsOneListener, "test_a_command_reaches_every_listener"),
    of_broker(queues.ForgetsArguments, "test_a_command_reaches_every_listener"),
    of_broker(queues.TellsInReverse, "test_a_command_reaches_every_listener"),
    of_broker(queues.SendsToAllApps, "test_commands_stay_in_their_namespace"),
    of_broker(queues.ListensForEver, "test_stopping_ends_listening"),
    of_broker(queues.MigratesAnew, "test_migrating_a_broker_changes_nothing_that_is_there"),
    of_broker(queues.ShufflesABatch, "test_order_is_kept_where_declared"),
    of_broker(queues.ForgetsWhoHolds, "test_leases_outlive_the_server_where_declared"),
    of_broker(brokers.JoinsNames, "test_namespaces_never_meet"),
    of_broker(brokers.RefusesLongNames, "test_the_longest_names_fit[-]"),
    of_broker(brokers.CutsLongUuids, *in_scripts("test_the_longest_uuids_fit", *SCRIPTS)),
    of_broker(brokers.RefusesLongUuids, *in_scripts("test_the_longest_uuids_fit", "ü", "中", "🦀")),
    of_storage(storages.CutsLongUuids, *in_scripts("test_the_longest_uuids_fit", *SCRIPTS)),
    of_storage(storages.TellsOfOneLine,
               *in_scripts("test_told_of_the_longest_uuids", "expect-marks", "watch-marks")),
    of_storage(shared.CutsLongKeys, *in_scripts("test_the_longest_uuids_have_streams", *SCRIPTS),
               *in_scripts("test_the_longest_keys_fit", *SCRIPTS),
               *in_scripts("test_the_longest_keys_and_owners_fit", *SCRIPTS)),
    of_storage(shared.WatchesAllLongKeys, *in_scripts("test_the_longest_key_is_watched", *SCRIPTS)),
    of_broker(brokers.Hoards, "test_closing_releases_what_was_not_returned",
              "test_stopping_releases_what_was_not_returned"),
    of_broker(brokers.DropsAllOnClose, "test_closing_releases_what_was_not_returned"),
    of_broker(brokers.WaitsAfterClose, "test_closing_ends_a_waiting_receive"),
    of_broker(brokers.IgnoresPriorities, "test_priorities_order_a_queue_where_declared"),
    of_broker(brokers.CountsNothing, "test_deliveries_are_counted_where_declared"),
    of_broker(brokers.PromisesLess, "test_guarantees_are_no_less_than_pinned"),
    of_broker(queues.CannotCount, "test_unsupported_is_what_raises[depth]"),
    of_broker(queues.HidesThatItCounts, "test_unsupported_is_what_raises[depth]",
              "test_guarantees_are_no_less_than_pinned"),
    of_broker(brokers.HangsWhenDown, "test_a_waiting_receive_outlives_the_server"),
    of_broker(brokers.StartsOnce, "test_a_waiting_receive_outlives_the_server"),
    of_broker(brokers.DropsRepeats, "test_each_submission_of_a_uuid_is_delivered"),
    of_broker(brokers.UsesWhatIsStopped, "test_it_is_closed_before_and_after",
              "test_stopping_ends_a_waiting_receive"),
    of_storage(storages.UsesWhatIsStopped, "test_it_is_closed_before_and_after"),
    of_broker(brokers.LiesWhenDown, "test_a_waiting_receive_outlives_the_server"),
    of_broker(("queues",), "test_messages_outlive_the_server"),
    of_storage(storages.ChangesFinals, "test_every_pair_of_states[two calls-different]",
               "test_one_of_two_finals_is_taken", "test_a_final_can_be_saved_again"),
    of_storage(storages.GoesBack, "test_every_pair_of_states[one call-same]"),
    of_storage(storages.ComparesAttemptsOfFinals, "test_every_pair_of_states[two calls-same]"),
    of_storage(storages.RefusesRepeats, "test_a_final_can_be_saved_again"),
    of_storage(storages.SaysDoneToAll, "test_every_pair_of_states[two clients-different]",
               "test_one_of_two_finals_is_taken"),
    of_storage(storages.HidesWhatIsThere, "test_a_final_can_be_saved_again"),
    of_storage(storages.RacesItself, "test_one_of_two_finals_is_taken"),
    of_storage(storages.ReadsStale, "test_get_sees_what_was_saved_elsewhere"),
    of_storage(storages.AnswersInItsOwnOrder, "test_get_answers_in_order"),
    of_storage(storages.LosesTheTraceback, "test_a_record_comes_as_it_went"),
    of_storage(storages.ReplacesFirstRecords, "test_one_of_two_first_records_is_taken",
               "test_a_watched_task_is_recorded",
               "test_every_pair_of_states[one call-different]"),
    of_storage(storages.IsInTheWayOfFirstRecords, "test_a_watched_task_is_recorded"),
    of_storage(storages.MixesNamespaces, "test_namespaces_never_meet",
               "test_lists_stay_in_their_namespace", "test_claims_stay_in_their_namespace",
               "test_values_stay_in_their_namespace", "test_streams_stay_in_their_namespace",
               "test_records_expire_in_their_namespace", "test_told_only_in_its_namespace"),
    of_storage(shared.PagesByNumber, "test_pages_are_stable_while_tasks_come"),
    of_storage(shared.AlwaysHasMore, "test_the_last_page_has_no_cursor"),
    of_storage(shared.ListsOldestFirst, "test_a_filter_shows_what_fits[0]",
               "test_pages_are_stable_while_tasks_come"),
    of_storage(shared.IgnoresFilters,
               *(f"test_a_filter_shows_what_fits[{at}]" for at in range(1, len(FILTERS)))),
    of_storage(shared.TakesAnyCursor, "test_a_cursor_that_is_none_is_refused"),
    of_storage(shared.ClaimsForAll, "test_one_of_many_has_a_claim",
               "test_a_claim_is_over_after_its_time"),
    of_storage(shared.NamesNobody, "test_a_claim_says_what_it_is"),
    of_storage(shared.NeverLetsGo, "test_a_claim_is_over_after_its_time",
               "test_a_killed_owner_loses_its_claim"),
    of_storage(shared.LetsGoEarly, "test_a_claim_is_over_after_its_time",
               "test_a_killed_owner_loses_its_claim"),
    of_storage(shared.ExtendsNothing, "test_the_owner_extends_a_claim"),
    of_storage(shared.ReleasesNothing, "test_a_released_claim_is_free"),
    of_storage(shared.ReleasesForAnybody, "test_a_released_claim_is_free"),
    of_storage(shared.TakesEmptyForNothing, "test_a_value_comes_as_it_went"),
    of_storage(shared.IgnoresWhatIsExpected, "test_a_value_is_set_if_it_is_the_expected"),
    of_storage(shared.ExpectsAnythingForNone, "test_a_value_is_set_if_it_is_the_expected"),
    of_storage(shared.ComparesThenSets, "test_processes_count_together"),
    of_storage(shared.ListsByPattern, "test_values_are_listed_by_prefix"),
    of_storage(shared.WatchesOnlyChanges, "test_a_watcher_sees_changes"),
    of_storage(shared.WatchesOnce, "test_a_watcher_sees_changes"),
    of_storage(shared.SeesEachChangeTwice, "test_a_watcher_sees_the_last_of_many_changes"),
    of_storage(shared.IsOneChangeBehind, "test_a_watcher_sees_the_last_of_many_changes"),
    of_storage(shared.WatchesForEver, "test_stopping_ends_watching"),
    of_storage(shared.CountsPositionsAnew, "test_items_are_read_in_order"),
    of_storage(shared.ReadsFromAfter, "test_items_are_read_in_order"),
    of_storage(shared.TearsBatches, "test_processes_append_together"),
    of_storage(shared.ForgetsStreams, "test_items_outlive_their_process"),
    of_storage(shared.HidesInsteadOfDeleting, "test_what_is_deleted_is_gone"),
    of_storage(shared.LeavesStreams, "test_what_is_deleted_is_gone_from_lists_and_streams"),
    of_storage(shared.ExpiresWhatRuns, "test_what_has_had_its_time_expires"),
    of_storage(shared.ExpiresNothing, "test_what_has_had_its_time_expires"),
    of_storage(shared.ExpiresByOneTime, "test_a_storage_has_a_retention_of_its_own"),
    of_storage(shared.MigratesAnew, "test_migrating_a_storage_changes_nothing_that_is_there"),
    of_storage(storages.PromisesLess, "test_guarantees_are_no_less_than_pinned"),
    of_storage(storages.WatchesWithoutReading,
               "test_told_of_what_was_final_before_it_watched"),
    of_storage(storages.ReadsBeforeItSubscribes,
               "test_told_of_what_becomes_final_while_it_begins_to_watch"),
    of_storage(storages.HearsOnlyWhileItListens,
               "test_told_of_what_came_before_it_received[expect]",
               "test_told_of_what_came_before_it_received[watch]"),
    of_storage(storages.DropsOnCancel, "test_cancelled_receives_strand_nothing"),
    of_storage(storages.TellsWhatItRefused, "test_a_refused_final_is_not_told"),
    of_storage(storages.TellsBeforeTheEnd, "test_told_only_of_the_end"),
    of_storage(storages.TellsOneWatcher, "test_each_client_hears_its_own"),
    of_storage(storages.ForgetsTooMuch, "test_what_is_forgotten_is_waited_for_no_more"),
    of_storage(storages.HangsWhenDown, "test_records_outlive_the_server"),
    of_storage(("records",), "test_records_outlive_the_server"),
    of_storage(("inboxes",), "test_an_inbox_outlives_the_server"),
    of_pair(brokers.SettlesFirst, "test_a_crash_in_completing_runs_nothing_twice[before]"),
    of_pair(brokers.RecordsRetriesFirst, "test_a_crash_in_retrying_loses_nothing[before]"),
    of_pair(brokers.RecordsLostRetries, "test_a_zombie_records_nothing[retry]"),
    of_pair(brokers.KeepsWhatWasRefused, "test_a_refused_final_is_acknowledged"),
    of_pair(brokers.RunsWhatIsFinal, "test_admit_knows_what_still_has_to_run"),
    of_pair(brokers.RecordsNothingNew, "test_submitted_is_published_and_recorded"),
    of_pair(brokers.LosesOnCrash, "test_many_workers_finish_each_task_once"),
    of_pair(storages.ChangesFinals, "test_a_zombie_records_nothing[ack]",
            "test_a_refused_final_is_acknowledged"),
    of_pair(brokers.RunsEveryCopy, "test_a_key_holds_when_publishing_was_in_doubt[written]",
            "test_a_key_outlives_a_client_that_dies[queued]",
            "test_of_two_unrecorded_copies_one_is_run", "test_a_retry_keeps_the_key"),
    of_pair(brokers.AdmitsWithoutRecording,
            "test_a_client_killed_while_submitting_loses_nothing[published-keyed]",
            "test_a_key_outlives_a_client_that_dies[begun]",
            "test_of_two_unrecorded_copies_one_is_run"),
    of_pair(brokers.RecordsBeforeItPublishes,
            "test_a_client_killed_while_submitting_loses_nothing[recorded-keyed]",
            "test_a_key_holds_when_publishing_was_in_doubt[not written]"),
    of_pair(brokers.RecordsWithoutTheSubmission, "test_a_key_is_taken_by_the_first",
            "test_each_of_a_batch_has_its_own_answer", "test_many_submit_one_key_at_once"),
    of_pair(brokers.SubmitsWhateverTheTransaction, "test_a_transaction_is_joined_or_refused"),
    of_pair(brokers.PublishesAgain, "test_what_was_published_is_not_published_again[plain]",
            "test_what_was_published_is_not_published_again[keyed]"),
    of_pair(brokers.DropsRepeats, "test_a_key_holds_when_publishing_was_in_doubt[written]",
            "test_a_key_outlives_a_client_that_dies[queued]"),
    of_pair(brokers.LosesTheSubmission, "test_of_two_unrecorded_copies_one_is_run"),
    of_pair(brokers.RecordsForItself, "test_a_late_record_is_that_of_the_publishing_that_runs"),
    of_pair(storages.ReplacesFirstRecords, "test_many_submit_one_key_at_once"),
    of_pair(storages.TakesAnything, "test_a_submit_repeated_late_changes_nothing"),
)  # fmt: skip
