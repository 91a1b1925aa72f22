import json

import pytest

from tests.conftest import script


@pytest.mark.long
def test_a_short_round(tmp_path):
    done = script('bench.py', '--rounds=1', '--tokens=10', '--size=small', f'--json={tmp_path / "b.json"}', timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / 'b.json').read_text())['figures']
    assert figures['train tokens_per_s']['ours'][0] > 0 and figures['sample float32 memory_mb']['ours'][0] > 0


@pytest.mark.parametrize(
    'words, message', [(['--peer=nowhere'], 'not a nanoGPT checkout'), (['--rounds=0'], 'rounds=0'), (['--mode=fast'], 'one of all')]
)
def test_mistakes(words, message):
    done = script('bench.py', *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
