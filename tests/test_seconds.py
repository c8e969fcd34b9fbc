"""The budget of the suite: who is over it is named, with what is slow; a slow machine is not."""

from seconds import LIMITS, PAPER, REFERENCE, part, report


def test_files_belong_to_papers_by_name() -> None:
    assert [part(f"tests/{f}.py") for f in ("papers/test_tarflow_lm_learned", "papers/test_tarflow", "test_paths")] == [
        "tarflow_lm",
        "tarflow",
        "house",
    ]
    assert part("tests/commands/test_part_commands.py") == "part"
    assert part("tests/test_contract.py") == part("tests/test_configs.py") == "contract"


def test_what_is_over_its_budget_is_named_with_its_slowest_files() -> None:
    files = {
        "test_part.py": PAPER,
        "test_part_timm.py": 1.0,
        "test_cli.py": LIMITS["house"] - 1,
        "test_tarflow.py": PAPER - 1,
    }
    lines, over = report(files, REFERENCE)
    assert [line.startswith(f"the tests of part cost {PAPER + 1:.0f} s") for line in over] == [True]
    assert f"test_part.py {PAPER:.0f}, test_part_timm.py 1" in over[0]
    assert lines[0].endswith("house")


def test_a_machine_of_half_the_speed_has_twice_the_time() -> None:
    assert not report({"test_part.py": 2 * PAPER - 1}, 2 * REFERENCE)[1]
    assert report({"test_part.py": 2 * PAPER + 1}, 2 * REFERENCE)[1]
