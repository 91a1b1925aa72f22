"""The command `lyregpt`: from the repository, from elsewhere, installed, and under torchrun."""

import shutil
import subprocess
import sys
import venv

import pytest

import lyregpt
from configurator import run
from lyregpt.__main__ import COMMANDS, main
from tests.conftest import DEMO, ROOT, script

TINY = [
    'config/small.py',  # the repository's, from any directory
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=32',
    '--batch_size=4',
    '--max_iters=4',
    '--warmup_iters=1',
    '--eval_interval=2',
    '--eval_iters=2',
    '--device=cpu',
    '--report=False',
    '--out_dir=out-tiny',
]


def command(monkeypatch, capsys, *words):
    """(exit status, stdout, stderr) of `lyregpt WORDS`, in this process."""
    monkeypatch.setattr(sys, 'argv', ['/somewhere/lyregpt/__main__.py', *words])
    capsys.readouterr()
    status = 0
    try:
        main()
    except SystemExit as left:
        status = left.code or 0
    return status, *capsys.readouterr()


def test_version_and_list_of_commands(monkeypatch, capsys):
    version = f'lyregpt {lyregpt.__version__}\n'
    assert command(monkeypatch, capsys, '--version') == (0, version, '')
    for words in [], ['-h'], ['--help']:
        status, out, _ = command(monkeypatch, capsys, *words)
        assert status == 0 and out.startswith('usage: lyregpt COMMAND')
        assert [line.split()[0] for line in out.splitlines()[2:]] == list(COMMANDS)
    done = script('-m', 'lyregpt', '--version')
    assert (done.returncode, done.stdout) == (0, version)


@pytest.mark.parametrize('name', COMMANDS)
def test_each_command_has_help_and_names_itself_in_errors(monkeypatch, capsys, name):
    status, out, err = command(monkeypatch, capsys, name, '--help')
    assert status == 0 and len(out) > 50 and not err
    status, out, err = command(monkeypatch, capsys, name, '--no_such_option=1')
    assert status == 2 and not out
    assert f'lyregpt {name}: error: ' in err.splitlines()[-1]


@pytest.mark.parametrize(
    'word, nearest', [('serv', 'serve'), ('quick_test', ''), ('Train', 'train')]
)
def test_an_unknown_command_gets_the_nearest(monkeypatch, capsys, word, nearest):
    status, _, err = command(monkeypatch, capsys, word)
    assert status == 2 and err.count('\n') == 1
    assert err.startswith(f'lyregpt: error: unknown command {word}')
    assert not nearest or f'; did you mean {nearest}?' in err


def test_help_for_configs_loads_no_torch():
    code = (
        'import atexit, sys; atexit.register(lambda: print("torch" in sys.modules)); '
        'sys.argv[1:] = ["convert-config", "--help"]; import lyregpt.__main__ as cli; cli.main()'
    )
    done = script('-c', code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == 'False', done.stderr


def test_errors_name_the_script_as_it_was_typed(monkeypatch, capsys):
    import train

    monkeypatch.setattr(sys, 'argv', ['some/where/train.py', '--batch_sise=3'])
    with pytest.raises(SystemExit):
        run(train.main)
    assert capsys.readouterr().err.startswith('train.py: error: unknown option --batch_sise; did')


@pytest.mark.parametrize('name', ['model', 'train', 'sample', 'bench', 'configurator'])
def test_a_file_that_hides_ours_is_named(tmp_path, name):
    (tmp_path / f'{name}.py').write_text('raise SystemExit("the wrong file was run")\n')
    done = script('-m', 'lyregpt', 'train', '--help', cwd=tmp_path, PYTHONPATH=ROOT)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and not done.stdout
    assert done.stderr.startswith('lyregpt: error: ')
    assert str(tmp_path / f'{name}.py') in done.stderr and 'rename it' in done.stderr
    done = script('-c', 'import lyregpt; lyregpt.load', cwd=tmp_path, PYTHONPATH=ROOT)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith('ImportError: ') and f'{name}.py hides the file of the same name' in last


def test_torchrun_starts_the_command(tmp_path, chars):
    """On another directory's dataset, with the repository's config."""
    words = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'lyregpt']
    words += ['train', *TINY, f'--dataset={chars}', '--gradient_accumulation_steps=2']
    done = script(*words, cwd=tmp_path, timeout=400, PYTHONPATH=ROOT, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert '2 processes' in done.stdout and (tmp_path / 'out-tiny' / 'ckpt.pt').exists()


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """An editable install, of a copy of the sources, in a fresh environment: its bin folder."""
    pytest.importorskip('setuptools', minversion='77')
    copy, environment = tmp_path_factory.mktemp('copy'), tmp_path_factory.mktemp('environment')
    for name in ('lyregpt', 'config'):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
    for path in [*ROOT.glob('*.py'), ROOT / 'pyproject.toml', ROOT / 'README.md', ROOT / 'LICENSE']:
        shutil.copy(path, copy)
    (copy / 'data' / 'darklyrics').mkdir(parents=True)
    shutil.copy(ROOT / 'data' / 'darklyrics' / 'prepare.py', copy / 'data' / 'darklyrics')
    shutil.copy(DEMO, copy / 'data' / 'darklyrics')

    builder = venv.EnvBuilder(with_pip=False, symlinks=sys.platform != 'win32')
    builder.create(environment)
    context = builder.ensure_directories(environment)
    # The packages of this environment, but not this checkout, if that is installed in it.
    here = next(path for path in sys.path if path.endswith('site-packages'))
    packages = subprocess.run(
        [context.env_exe, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with open(f'{packages}/packages.pth', 'w', encoding='utf-8') as f:
        f.write(f'import sys; sys.path.append({here!r})\n')
    words = ['--python', context.env_exe, 'install', '-q', '--no-deps', '--no-build-isolation']
    done = script('-m', 'pip', *words, '--no-index', '-e', copy, timeout=300)
    assert done.returncode == 0, done.stderr
    return copy, context.bin_path


def test_an_editable_install(tmp_path, installed):
    """The command runs in any directory: version, data, training, generating, an error."""
    copy, scripts = installed
    lyre = f'{scripts}/lyregpt'

    def call(*words):
        return subprocess.run(
            [lyre, *words], cwd=tmp_path, capture_output=True, text=True, timeout=400
        )

    assert call('--version').stdout == f'lyregpt {lyregpt.__version__}\n'
    done = call('train', *TINY, '--dataset=darklyrics')  # prepares it, too
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out-tiny' / 'ckpt.pt').exists()
    assert (copy / 'data' / 'darklyrics' / 'train.bin').exists()
    done = call('sample', '--out_dir=out-tiny', '--num_samples=1', '--max_new_tokens=5')
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = call('train', '--n_layr=2')
    assert done.returncode == 2
    assert done.stderr.startswith('lyregpt train: error: unknown option --n_layr; did you mean')

    (tmp_path / 'model.py').write_text('mine = 1\n')
    assert call('--version').returncode == 0, 'a script does not look in the current directory'
    done = subprocess.run(
        [f'{scripts}/python', '-m', 'lyregpt', '--version'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and 'model.py hides the file' in done.stderr
