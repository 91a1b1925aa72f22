"""A short round of the driver that breaks training runs on purpose; python tests/faults/driver.py tells of the long one."""

import pytest

from tests.faults.driver import FaultsConfig, drive


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_every_fault_is_survived(capsys):
    few = FaultsConfig(kills=1, damages=12, fall_backs=1, signals=1, restarts=1, stops=0, full_disks=1, nans=1, data=2, code=2)
    tallies = drive(few)
    wrong = [wrong for tally in tallies.values() for wrong in tally.wrong]
    assert not wrong, wrong
    assert sum(tally.survived for tally in tallies.values()) == 22


@pytest.mark.long
def test_a_process_that_hangs_is_given_up():
    tally = drive(FaultsConfig(0, 0, 0, 0, 0, stops=1, full_disks=0, nans=0, data=0, code=0))['stops']
    assert tally.survived == 1, tally.wrong
