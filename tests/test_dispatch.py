"""Primitives, switches and the board: what is chosen, what is obeyed, what is an error, and what is left behind."""

import json
import time

import numpy as np
import pytest

from nanocnn.kernels import dispatch, tuned
from nanocnn.kernels.cuda import device
from nanocnn.kernels.dispatch import (
    ChoiceError,
    DeviceError,
    Primitive,
    Switch,
    board,
    choices_in_force,
    device_of,
    parse_use,
    span,
    switches_asked,
    to_device,
    use,
    using,
    xp_of,
)

x32, x64 = np.ones(4, np.float32), np.ones(4, np.float64)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Whatever a test registers or chooses is gone after it, and tuned choices go to a folder of its own."""
    monkeypatch.setenv("NANOCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "choices", {})
    primitives, switches = dict(dispatch.primitives), dict(dispatch.switches)
    before = dispatch._policy, dispatch._choices
    yield
    dispatch._policy, dispatch._choices = before
    for registry, kept in ((dispatch.primitives, primitives), (dispatch.switches, switches)):
        registry.clear()
        registry.update(kept)


@pytest.fixture
def ladder():
    """Four rungs that say which of them ran; the last supports only float64, `lesson` runs only by name."""

    @Primitive
    def disp_ladder(x, n=1):
        """who ran

        and more about it
        """
        return "reference"

    @disp_ladder.variant("lesson", auto=False)
    def lesson(x, n=1):
        """a rung to learn from"""
        return "lesson"

    @disp_ladder.variant("quick")
    def quick(x, n=1):
        """the usual one"""
        return "quick"

    @disp_ladder.variant("wide", supports=lambda x, n=1: x.dtype == np.float64 and n == 1)
    def wide(x, n=1):
        """float64 only"""
        return "wide"

    @disp_ladder.variant("gpu", device="cuda")
    def gpu(x, n=1):
        return "gpu"

    return disp_ladder


# ------------------------------------------------------------------ the policy


def test_fastest_is_the_last_variant_that_supports_the_call(ladder):
    with using("fastest"):
        assert ladder(x64) == "wide"
        assert ladder(x64, n=2) == "quick"
        assert ladder(x32) == "quick"
        assert ladder(np.ones(4, np.int64)) == "reference"  # plain_floats: nothing else supports integers


def test_reference_is_the_first_body(ladder):
    with using("reference"):
        assert ladder(x64) == "reference"


def test_a_primitive_may_have_a_policy_of_its_own(ladder):
    with using("reference", disp_ladder="fastest"):
        assert ladder(x32) == "quick"
    with using("fastest", disp_ladder="reference"):
        assert ladder(x32) == "reference"


def test_mixed_dtypes_are_not_plain_floats(ladder):
    assert not dispatch.plain_floats(x32, x64)
    assert dispatch.plain_floats(x32, np.ones(2, np.int64), 3, w=x32)
    assert not dispatch.plain_floats(np.ones(2, np.float16))


def test_candidates_are_those_of_the_device_and_the_call(ladder):
    assert [v.name for v in ladder.candidates(x64)] == ["reference", "lesson", "quick", "wide"]
    assert [v.name for v in ladder.candidates(x32)] == ["reference", "lesson", "quick"]


# ------------------------------------------------------------------ an explicit choice is obeyed or is an error


def test_an_explicit_choice_is_obeyed(ladder):
    for name in ("reference", "lesson", "quick", "wide"):
        with using("fastest", disp_ladder=name):
            assert ladder(x64) == name


def test_an_explicit_choice_that_cannot_is_an_error_that_names_those_that_can(ladder):
    with using(disp_ladder="wide"), pytest.raises(ChoiceError) as error:
        ladder(x32, n=2)
    text = str(error.value)
    assert "disp_ladder=wide cannot do this call: float32[4], n=2 on cpu" in text
    assert "reference, lesson, quick" in text
    assert "test_dispatch.py:" in text


def test_a_variant_of_another_device_is_an_error(ladder):
    with using(disp_ladder="gpu"), pytest.raises(ChoiceError, match="on cpu"):
        ladder(x32)


def test_unknown_names_are_errors_that_list_what_exists(ladder):
    Switch("disp_switch", "about it", on="yes", off="no")
    with pytest.raises(ChoiceError, match=r"unknown primitive or switch 'im2kol'; .*disp_ladder, disp_switch"):
        use(im2kol="numba")
    with pytest.raises(
        ChoiceError, match=r"no choice 'slow'; there are: reference, lesson, quick, wide, gpu, fastest, tuned \("
    ):
        use(disp_ladder="slow")
    with pytest.raises(ChoiceError, match=r"disp_switch has no choice 'fastest'; there are: on, off"):
        use(disp_switch="fastest")
    with pytest.raises(ChoiceError, match="unknown policy 'fast': expected one of fastest, tuned, reference"):
        use("fast")
    with pytest.raises(ChoiceError, match="one policy at a time"):
        use("fastest", "tuned")


def test_a_refused_choice_changes_nothing(ladder):
    before = choices_in_force()
    with pytest.raises(ChoiceError):
        use("reference", disp_ladder="quick", nonsense="x")
    assert choices_in_force() == before


def test_names_are_taken_once(ladder):
    with pytest.raises(ChoiceError, match="'disp_ladder' is taken"):
        Switch("disp_ladder", "", on="", off="")
    with pytest.raises(ChoiceError, match="'fastest' is taken"):
        Switch("fastest", "", on="", off="")
    with pytest.raises(ChoiceError, match="already has a variant 'quick'"):
        ladder.variant("quick")
    with pytest.raises(ChoiceError, match="already has a variant 'tuned'"):
        ladder.variant("tuned")


# ------------------------------------------------------------------ up to a rung, and no further


def test_up_to_a_rung_is_that_rung_where_it_can_else_the_nearest_before_it(ladder):
    with using(disp_ladder="upto:wide"):
        assert ladder(x64) == "wide"
        assert ladder(x64, n=2) == "quick"
        assert ladder(x32) == "quick"
        assert ladder(np.ones(4, np.int64)) == "reference"
    with using("reference", disp_ladder="upto:quick"):
        assert ladder(x64) == "quick"  # though `wide` could
    with using(disp_ladder="upto:reference"):
        assert ladder(x64) == "reference"
    with using(disp_ladder="upto:gpu"):
        assert ladder(x64) == "wide"


def test_a_rung_to_learn_from_runs_where_it_is_the_end_and_not_on_the_way_to_it(ladder):
    with using(disp_ladder="upto:lesson"):
        assert ladder(x64) == "lesson"
        assert ladder(np.ones(4, np.int64)) == "reference"
    with using(disp_ladder="upto:quick"):
        assert ladder(np.ones(4, np.int64)) == "reference"  # `lesson` lies between, and was not named


def test_up_to_an_unknown_rung_is_an_error_that_lists_them(ladder):
    Switch("disp_switch", "about it", on="yes", off="no")
    with pytest.raises(ChoiceError, match=r"no choice 'upto:slow'; there are: reference, lesson, quick, .*upto:NAME"):
        use(disp_ladder="upto:slow")
    with pytest.raises(ChoiceError, match="disp_switch has no choice 'upto:on'; there are: on, off"):
        use(disp_switch="upto:on")
    with pytest.raises(ChoiceError, match="no choice 'upto:fastest'"):
        use(disp_ladder="upto:fastest")
    with pytest.raises(ChoiceError, match="cannot be called 'upto:quick'"):
        ladder.variant("upto:quick")


def test_up_to_is_written_on_a_command_line_and_on_the_board(ladder):
    assert parse_use(["disp_ladder=upto:quick"]) == ((), {"disp_ladder": "upto:quick"})
    with using(disp_ladder="upto:quick"):
        assert {row["name"]: row["current"] for row in board()}["disp_ladder"] == "upto:quick"


# ------------------------------------------------------------------ using()


def test_using_nests_and_restores(ladder):
    switch = Switch("disp_switch", "about it", on="yes", off="no")
    with using("reference", disp_switch="off"):
        with using(disp_ladder="quick"):
            assert (ladder(x32), switch.value) == ("quick", "off")
            with using("fastest", disp_switch="on"):
                assert (ladder(x64), switch.value) == ("quick", "on")
        assert (ladder(x32), switch.value) == ("reference", "off")
    assert (ladder(x32), switch.value) == ("quick", "on")


def test_using_restores_after_an_error(ladder):
    before = choices_in_force()
    with pytest.raises(ZeroDivisionError), using("reference", disp_ladder="quick"):
        1 / 0  # noqa: B018
    assert choices_in_force() == before


def test_use_holds_until_further_notice_and_is_recorded(ladder):
    Switch("disp_switch", "about it", on="yes", off="no")
    use("reference", disp_ladder="quick")
    use(disp_switch="off")
    force = choices_in_force()
    assert (force["policy"], force["disp_ladder"], force["disp_switch"]) == ("reference", "quick", "off")
    json.dumps(force)


def test_parse_use():
    assert parse_use(["fastest", "im2col=reference", "overlap=off"]) == (
        ("fastest",),
        {"im2col": "reference", "overlap": "off"},
    )
    assert parse_use([]) == ((), {})
    policy, choices = parse_use(["im2col"])  # the "=..." was forgotten
    with pytest.raises(ChoiceError, match="unknown policy 'im2col'"):
        use(*policy, **choices)


# ------------------------------------------------------------------ the board


def test_the_board_lists_primitives_and_switches(ladder):
    Switch("disp_switch", "about it", on="yes", off="no")
    rows = {row["name"]: row for row in board()}
    row = rows["disp_ladder"]
    assert (row["kind"], row["current"], row["about"]) == ("primitive", "fastest", "who ran")
    assert list(row["choices"]) == ["reference", "lesson", "quick", "wide", "gpu"]
    assert row["choices"]["quick"].startswith("the usual one (test_dispatch.py:")
    assert row["place"].startswith("test_dispatch.py:")
    row = rows["disp_switch"]
    assert (row["kind"], row["current"], row["choices"]) == ("switch", "on", {"on": "yes", "off": "no"})
    with using(disp_ladder="quick", disp_switch="off"):
        rows = {row["name"]: row for row in board()}
        assert (rows["disp_ladder"]["current"], rows["disp_switch"]["current"]) == ("quick", "off")
    json.dumps(board())


def test_every_entry_of_the_real_board_says_what_it_does():
    import nanocnn.kernels  # noqa: F401

    for row in board():
        assert row["about"], f"{row['name']} ({row['place']}) says nothing about itself"
        for choice, text in row["choices"].items():
            assert choice == "reference" or text.partition(" (")[0], f"{row['name']}={choice} says nothing about itself"


def test_a_switch_is_asked_by_what_acts_on_it_and_not_by_what_lists_it():
    switch = Switch("disp_switch", "about it", on="yes", off="no")
    board(), choices_in_force()
    assert "disp_switch" not in switches_asked()
    with using(disp_switch="off"):
        assert switch.value == "off"
        assert switches_asked()["disp_switch"] == "off"


# ------------------------------------------------------------------ tuned


@pytest.fixture
def runners():
    """A slow last rung and a quick middle one, and how often each ran."""
    ran = {"reference": 0, "middle": 0, "last": 0}

    @Primitive
    def disp_tuned(x):
        """sleeps"""
        ran["reference"] += 1
        time.sleep(0.004)

    @disp_tuned.variant("middle")
    def middle(x):
        ran["middle"] += 1

    @disp_tuned.variant("last")
    def last(x):
        ran["last"] += 1
        time.sleep(0.004)

    return disp_tuned, ran


def test_tuned_measures_each_shape_once_and_keeps_the_quickest(runners):
    primitive, ran = runners
    with using("tuned"):
        assert primitive.choose(x32).name == "middle"
        assert ran == {"reference": 4, "middle": 4, "last": 4}
        primitive(x32)
        assert ran == {"reference": 4, "middle": 5, "last": 4}
        primitive(np.ones(5, np.float32))  # another shape is another question
        assert ran["last"] == 8
    kept = json.loads(tuned.file().read_text())
    assert kept == {"disp_tuned(float32[4])": "middle", "disp_tuned(float32[5])": "middle"}
    assert [p.name for p in tuned.file().parent.iterdir()] == [tuned.file().name]


def test_tuned_looks_past_what_a_primitive_does_not_key():
    measured = []

    @Primitive(unkeyed=("seed", "epoch"))
    def disp_unkeyed(x, n, seed, epoch=0):
        """draws"""
        measured.append("reference")

    @disp_unkeyed.variant("numba", supports=dispatch.anything)
    def fast(x, n, seed, epoch=0):
        measured.append("numba")

    with using("tuned"):
        for epoch in range(3):
            disp_unkeyed.choose(x32, 2, seed=7 + epoch, epoch=epoch)
            disp_unkeyed.choose(x32, 2, 7, epoch)
        assert len(measured) == 8
        disp_unkeyed.choose(x32, 3, 7)
    assert list(tuned.choices) == ["disp_unkeyed(float32[4], 2)", "disp_unkeyed(float32[4], 3)"]
    with pytest.raises(TypeError, match="disp_misspelt has no argument sead"):

        @Primitive(unkeyed=("sead",))
        def disp_misspelt(x, seed):
            """draws"""


def test_a_dropout_mask_of_another_epoch_is_not_measured_again():
    from nanocnn.kernels.dropout import dropout

    samples = np.arange(2)
    with using("tuned"):
        for epoch in range(3):
            dropout(np.ones((2, 3), np.float32), samples, 0.5, np.array([11, epoch, 1 << 24]))
    keys = [key for key in tuned.choices if key.startswith("dropout(")]
    assert keys == ["dropout(float32[2, 3], int64[2], 0.5, int64[3])"]


def test_tuned_measures_nothing_where_there_is_no_choice(runners):
    primitive, ran = runners
    with using("tuned"):
        assert primitive.choose(np.ones(4, np.int64)).name == "reference"
    assert sum(ran.values()) == 0
    assert not tuned.choices


def test_tuned_takes_up_the_file(runners, monkeypatch):
    primitive, ran = runners
    tuned.file().parent.mkdir(parents=True)
    tuned.file().write_text(json.dumps({"disp_tuned(float32[4])": "last"}))
    with using("tuned"):
        assert primitive.choose(x32).name == "last"
    assert sum(ran.values()) == 0


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "null", "\x00\xff", '{"disp_tuned(float32[4])": "no"}', '{"disp_tuned(float32[4])": [1]}'],
)
def test_a_corrupt_tuned_file_is_measured_anew(runners, text):
    primitive, _ = runners
    tuned.file().parent.mkdir(parents=True)
    tuned.file().write_bytes(text.encode("latin-1"))
    with using("tuned"):
        assert primitive.choose(x32).name == "middle"
    assert json.loads(tuned.file().read_text())["disp_tuned(float32[4])"] == "middle"


def test_a_cache_that_cannot_be_written_costs_only_the_measuring(runners, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCNN_CACHE", str(tmp_path / "file" / "below"))
    with using("tuned"):
        assert runners[0].choose(x32).name == "middle"
        assert runners[0].choose(x32).name == "middle"
    assert runners[1]["middle"] == 4


def test_a_user_without_a_home_is_no_error(runners, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NANOCNN_CACHE")
    monkeypatch.setattr(dispatch.Path, "home", homeless)
    with using("tuned"):
        assert runners[0].choose(x32).name == "middle"


def test_ranks_that_do_not_measure_take_the_last_automatic_rung(runners, monkeypatch, ladder):
    monkeypatch.setattr(tuned, "measuring", False)
    with using("tuned"):
        assert runners[0].choose(x32).name == "last"
        assert ladder.choose(x32).name == "quick"
    assert sum(runners[1].values()) == 0


def test_tuned_runs_no_inplace_primitive_twice():
    calls = []

    @Primitive(inplace=True)
    def disp_inplace(x):
        """adds one"""
        calls.append("reference")

    @disp_inplace.variant("numba")
    def fast(x):
        calls.append("numba")

    with using("tuned"):
        disp_inplace(x32)
    assert calls == ["numba"]


# ------------------------------------------------------------------ recording, work, devices


class Recorder(dispatch.Recorder):
    def __init__(self):
        self.log = []

    def enter(self, name, kind):
        self.log.append(("enter", name, kind))

    def leave(self, start, stop, **facts):
        assert stop >= start
        self.log.append(("leave", facts))


def test_calls_and_spans_are_recorded(ladder, monkeypatch):
    ladder.work(lambda x, n=1: (2.0 * x.size * n, x.nbytes))
    recorder = Recorder()
    monkeypatch.setattr(dispatch, "recorder", recorder)
    with span("Conv2d", "backward", layer="stem"):
        ladder(x32, n=3)
    assert recorder.log == [
        ("enter", "Conv2d", "backward"),
        ("enter", "disp_ladder", "kernel"),
        ("leave", {"variant": "quick", "flops": 24.0, "bytes": 16, "shapes": "float32[4], n=3"}),
        ("leave", {"layer": "stem"}),
    ]


def test_a_span_is_left_after_an_error_and_by_the_recorder_that_it_entered(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(dispatch, "recorder", recorder)

    def work():
        with span("a", "data"):
            dispatch.recorder = None  # the profile ends meanwhile, in another thread
            raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        work()
    assert recorder.log == [("enter", "a", "data"), ("leave", {})]


def test_paused_records_nothing_and_restores(ladder, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(dispatch, "recorder", recorder)

    def work():
        with dispatch.paused():
            ladder(x32)
            raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        work()
    assert recorder.log == []
    assert dispatch.recorder is recorder


def test_work_is_the_function_that_was_given(ladder):
    assert ladder.count_work is None
    count = ladder.work(lambda x, n=1: (x.size, x.nbytes))
    assert ladder.count_work is count
    assert ladder.count_work(x32) == (4, 16)


def test_a_primitive_is_named_after_its_reference(ladder):
    assert (ladder.name, ladder.__name__) == ("disp_ladder", "disp_ladder")
    assert repr(ladder) == "<Primitive disp_ladder: reference, lesson, quick, wide, gpu>"
    assert ladder.__wrapped__(x32) == "reference"


def test_the_device_is_the_type_of_the_array():
    assert xp_of(x32) is np
    assert device_of(np.float32(1)) == "cpu"
    assert to_device(x32, "cpu") is x32
    for wrong in ([1.0], "text", None):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array"):
            xp_of(wrong)
    with pytest.raises(DeviceError, match="unknown device 'tpu'"):
        to_device(x32, "tpu")


def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)  # importing it now raises ImportError
    device.check.cache_clear()
    with pytest.raises(DeviceError, match=r"CuPy is not installed.*\[cuda1[23]\]'"):
        to_device(x32, "cuda")


def test_a_rung_may_be_put_before_another(ladder):
    ladder.variant("slow", before="quick")(lambda x, n=1: "slow")
    assert list(ladder.variants) == ["reference", "lesson", "slow", "quick", "wide", "gpu"]
    with pytest.raises(ChoiceError, match="no rung 'reference'"):
        ladder.variant("first", before="reference")


def test_whether_a_rung_pays_may_depend_on_the_call(ladder):
    ladder.variant("large", auto=lambda x, n=1: x.size > 4)(lambda x, n=1: "large")
    assert ladder(x32) == "quick"
    assert ladder(np.ones(5, np.float32)) == "large"
    with using(disp_ladder="large"):
        assert ladder(x32) == "large"  # asked for by name, it does what it can
