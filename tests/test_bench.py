import json

import pytest

from lyregpt.measure import Table
from tests.conftest import script


@pytest.mark.long
def test_a_short_round(tmp_path):
    done = script(
        'bench.py',
        '--rounds=1',
        '--tokens=10',
        '--size=small',
        f'--json={tmp_path / "b.json"}',
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / 'b.json').read_text())['figures']
    for name in (
        'train small 12x64 tokens_per_s',
        'sample small float32 x1 tokens_per_s',
        'data gpt2 mb_per_s',
        'memory small 1x64 weights_mb',
    ):
        assert figures[name]['ours'][0] > 0, name


def test_memory_by_parts(tmp_path):
    done = script(
        'bench.py', '--mode=memory', '--rounds=1', '--size=small', f'--json={tmp_path / "b.json"}'
    )
    assert done.returncode == 0, done.stderr
    figures = {
        k.split()[-1]: v['ours'][0]
        for k, v in json.loads((tmp_path / 'b.json').read_text())['figures'].items()
    }
    assert figures['gradients_mb'] == figures['weights_mb'] and figures[
        'optimizer_mb'
    ] == pytest.approx(2 * figures['weights_mb'], rel=0.01)
    assert '12 layers' not in done.stdout and 'memory small 1x64 weights_mb' in done.stdout


def test_a_noisy_machine_is_told(capsys):
    speeds = iter([100e9, 100e9, 40e9, 100e9])
    table = Table(lambda: next(speeds), rounds=2)
    seconds = iter([1.0, 2.0, 1.0, 1.0])
    table.measure('run', lambda: {'wall_s': next(seconds)}, lambda: {'wall_s': next(seconds)})
    table.show()
    told = capsys.readouterr().out
    assert (
        'the speed of the machine itself changed' in told
        and 'the pairs differ by more than half' in told
    )
    assert '0.75' in told, 'the median of the ratios 0.5 and 1'
    quiet = Table(lambda: 1e9, rounds=2)
    quiet.measure('run', lambda: {'wall_s': 1.0}, lambda: {'wall_s': 2.0})
    quiet.show()
    assert 'too noisy' not in capsys.readouterr().out


@pytest.mark.parametrize(
    'words, message',
    [
        (['--peer=nowhere'], 'not a nanoGPT checkout'),
        (['--rounds=0'], 'rounds=0'),
        (['--mode=fast'], 'one of all'),
        (['--mode=loss', '--peer=transformers'], 'serves --mode=sample only'),
        (['--mode=tokens'], 'give a folder'),
    ],
)
def test_mistakes(words, message):
    done = script('bench.py', *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
