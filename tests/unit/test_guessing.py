"""How much is guessed: what pays, and at nobody's cost."""

from mlx_server.engine.schedule.guessing import FORGOTTEN, KEPT, Chance, Guessing, PassTimes

SURE = Chance(8, 0.95, 0.95)


def learned(rows: int, *, step: float, token: float, padded: bool = False) -> Guessing:
    """Of steps of `rows` that take `step` seconds, and `token` more for each guessed one."""
    guessing = Guessing(padded=padded)
    for _ in range(3):
        guessing.stepped(rows, step)
    for guesses in (1, 4, 8, 16, 64, 128):
        guessing._passes.measured(rows + guesses, step + token * guesses)
    return guessing


def test_nothing_is_guessed_before_it_is_known_what_a_step_takes() -> None:
    assert Guessing(padded=False).allot([1], {1: SURE}) == {}


def test_passes_grow_as_it_is_learned_what_they_take() -> None:
    guessing, sizes = Guessing(padded=False), []
    for _ in range(2):
        guessing.stepped(1, 1.0)
    for _ in range(4):
        tokens = 1 + guessing.allot([1], {1: SURE})[1]
        sizes.append(tokens)
        guessing.verified({1: tokens}, tokens, 1.0)
    assert sizes == [2, 4, 8, 9]


def test_likely_guesses_are_made_where_they_cost_little() -> None:
    assert learned(1, step=1.0, token=0.05).allot([1], {1: SURE}) == {1: 8}


def test_unlikely_or_dear_guesses_are_not_made() -> None:
    assert learned(1, step=1.0, token=0.05).allot([1], {1: Chance(8, 0.05, 0.05)}) == {}
    assert learned(1, step=1.0, token=1.0).allot([1], {1: SURE}) == {}


def test_a_row_without_guesses_is_not_slowed_down_by_those_of_others() -> None:
    guessing = learned(2, step=1.0, token=0.1)
    assert sum(guessing.allot([1, 2], {1: SURE}).values()) * 0.1 <= 0.3
    for _ in range(10):
        guessing.verified({1: 3, 2: 1}, 4, 1.2)
    assert guessing.allot([1, 2], {1: SURE}) == {}, "its credit is used up"
    assert guessing.allot([1, 2], {1: SURE, 2: SURE}) == {1: 8, 2: 8}


def test_what_a_row_has_gained_it_may_lose_to_others() -> None:
    guessing = learned(2, step=1.0, token=0.1)
    guessing.verified({1: 9, 2: 9}, 18, 2.6)
    assert guessing.allot([1, 2], {1: SURE})[1] > 4


def test_a_row_that_was_unlucky_gets_another_try_after_a_while() -> None:
    guessing = learned(1, step=1.0, token=0.2)
    for _ in range(2):
        guessing.verified({1: 1}, 5, 1.8)
    even = Chance(8, 0.6, 0.6)
    assert guessing.allot([1], {1: even}) == {}
    steps = 0
    while not guessing.allot([1], {1: even}):
        guessing.stepped(1, 1.0)
        steps += 1
    assert 40 < steps < 120, "a step that passes gives 1 % of it back"


def test_what_a_wrong_guess_leaves_to_be_computed_again_makes_for_shorter_guesses() -> None:
    chances = {1: Chance(8, 0.8, 0.8)}
    once = learned(1, step=1.0, token=0.1, padded=True)
    again = learned(1, step=1.0, token=0.1, padded=True)
    again._goes_back = True
    assert 0 < again.allot([1], chances)[1] < once.allot([1], chances)[1]
    again._passes.measured(2, 0.3)
    assert again.allot([1], chances), "a pass may seem to take less time than a step"


def test_guesses_that_are_likely_once_they_were_right_are_deep_or_none() -> None:
    guessing = learned(1, step=1.0, token=0.05)
    assert guessing.allot([1], {1: Chance(8, 0.5, 0.99)}) == {1: 8}
    assert guessing.allot([1], {1: Chance(8, 0.02, 0.99)}) == {}


def test_a_step_that_is_read_early_is_a_loan() -> None:
    guessing = learned(1, step=1.0, token=0.5)
    likely = Chance(8, 0.6, 0.6)
    for _ in range(20):
        guessing.settled(1, 0.05)
        guessing.verified({1: 1}, 2, 1.0)
        guessing.started(1, 1.0)
        guessing.stepped(1, 1.0)
    assert guessing.allot([1], {1: likely}) == {1: 1}, "it has cost nothing"
    for _ in range(20):
        guessing.verified({1: 1}, 2, 1.0)
        guessing.started(1, 1.0)
        guessing.stepped(1, 1.0)
    assert guessing.allot([1], {1: likely}) == {}


def test_rows_pay_for_what_a_pass_leaves_to_do() -> None:
    guessing = learned(2, step=1.0, token=0.1)
    guessing.verified({1: 9, 2: 3}, 12, 1.3)
    before = guessing.allot([1, 2], {1: SURE})[1]
    guessing.started(2, 0.5)
    guessing.stepped(2, 2.0)
    guessing.stepped(2, 1.0)
    after = guessing.allot([1, 2], {1: SURE})[1]
    assert after < before
    guessing.stepped(2, 9.0)
    guessing.stepped(2, 9.0)
    assert guessing.allot([1, 2], {1: SURE})[1] == after, "later ones have other reasons"


def test_what_a_draft_model_takes_is_weighed_too() -> None:
    drafted = SURE._replace(drafted=True)
    cheap, dear = (learned(1, step=1.0, token=0.05) for _ in range(2))
    for _ in range(5):
        cheap.drafted(1, 4, 4 * 0.1)
        dear.drafted(1, 4, 4 * 1.2)
    assert cheap.allot([1], {1: drafted})[1] > 4
    assert dear.allot([1], {1: drafted}) == {}
    assert dear.allot([1], {1: SURE}) == {1: 8}, "other guesses cost nothing"


def test_time_spent_on_drafting_is_charged_to_rows_without() -> None:
    drafted = SURE._replace(drafted=True)
    guessing = learned(2, step=1.0, token=0.02)
    guessing.drafted(1, 1, 0.02)
    assert guessing.allot([1, 2], {1: drafted})
    for _ in range(3):
        guessing.verified({1: 2, 2: 1}, 4, 1.0, drafting=0.1)
    assert guessing.allot([1, 2], {1: drafted}) == {}


def test_passes_that_pad_count_what_they_compute() -> None:
    alone = learned(8, step=1.0, token=0.02).allot([*range(8)], {0: SURE})
    padded = learned(8, step=1.0, token=0.02, padded=True).allot([*range(8)], {0: SURE})
    assert padded.get(0, 0) < alone[0]


def test_a_time_that_was_an_accident_is_forgotten() -> None:
    times = PassTimes()
    times.measured(8, 50.0)
    for _ in range(FORGOTTEN + 1):
        times.measured(2, 1.0)
    assert (times.seconds(8) or 50.0) < 2.0


def test_what_interrupts_a_pass_or_a_step_is_no_reason_to_stop_guessing() -> None:
    guessing = learned(2, step=1.0, token=0.05)
    for turn in range(12):
        interrupted = 20.0 if turn % 4 == 3 else 0.0
        assert guessing.allot([1, 2], {1: SURE, 2: SURE}) == {1: 8, 2: 8}
        guessing.settled(2, 1.0)
        guessing.verified({1: 9, 2: 9}, 18, 1.8 + interrupted)
        guessing.started(2, 0.1 + interrupted)
        guessing.stepped(2, 1.0 + interrupted)
        guessing.stepped(2, 1.0)
    assert guessing.allot([1, 2], {1: SURE})[1] > 4, "what is gained is not lost by it"


def test_a_first_pass_that_is_interrupted_is_tried_again() -> None:
    guessing = learned(1, step=1.0, token=0.05)
    guessing._passes = PassTimes()
    guessing.verified({1: 2}, 2, 30.0)
    assert guessing.allot([1], {1: SURE}) == {}
    steps = 0
    while not guessing.allot([1], {1: SURE}):
        guessing.stepped(1, 1.0)
        steps += 1
        assert steps < 300


def test_a_time_may_be_measured_again_at_any_moment() -> None:
    for pause in range(FORGOTTEN * KEPT - 3, FORGOTTEN * KEPT + 4):
        times = PassTimes()
        for _ in range(KEPT):
            times.measured(8, 2.0)
        for _ in range(pause):
            times.measured(2, 1.0)
        for _ in range(KEPT):
            times.measured(8, 3.0)
            times.measured(2, 1.0)
        assert (times.seconds(8), times.seconds(2)) == (3.0, 1.0)
