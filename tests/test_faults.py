"""A short round of tests/faults/driver.py, which breaks training runs on purpose."""

import pytest

from tests.faults.driver import FaultsConfig, drive


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
@pytest.mark.parametrize(
    'few, all_of_them',
    [
        (
            FaultsConfig(
                kills=1,
                damages=4,
                fall_backs=0,
                signals=0,
                restarts=1,
                stops=0,
                full_disks=0,
                nans=1,
                data=1,
                code=1,
            ),
            9,
        ),
        pytest.param(
            FaultsConfig(
                kills=2, damages=12, fall_backs=1, signals=3, restarts=1, stops=0, data=2, code=2
            ),
            25,
            marks=pytest.mark.long,
        ),
    ],
)
def test_every_fault_is_survived(few, all_of_them, capsys):
    tallies = drive(few)
    wrong = [wrong for tally in tallies.values() for wrong in tally.wrong]
    assert not wrong, wrong
    assert sum(tally.survived for tally in tallies.values()) == all_of_them


@pytest.mark.long
def test_a_process_that_hangs_is_given_up():
    tally = drive(FaultsConfig(0, 0, 0, 0, 0, stops=1, full_disks=0, nans=0, data=0, code=0))[
        'stops'
    ]
    assert tally.survived == 1, tally.wrong
