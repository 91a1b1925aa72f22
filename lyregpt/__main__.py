"""The command `lyregpt COMMAND [options]`, also `python -m lyregpt COMMAND [options]`."""

import importlib
import sys

import lyregpt

COMMANDS = {
    'train': ('train', 'train a GPT'),
    'sample': ('sample', 'generate text with a trained model'),
    'bench': ('bench', 'measure speed, memory, and the time to a loss'),
    'serve': ('lyregpt.serve', 'an OpenAI-compatible API and a web page'),
    'export': ('lyregpt.export', 'write a Hugging Face folder or a GGUF file'),
    'report': ('lyregpt.report', 'write the report of a run'),
    'originality': ('lyregpt.originality', 'compare text with the training split'),
    'checkpoint': ('lyregpt.checkpoint', 'inspect, verify, merge or split checkpoints'),
    'tokenizer': ('lyregpt.tokenizer', 'train a tokenizer, encode and decode with it'),
    'doctor': ('lyregpt.doctor', 'check the installation'),
    'convert-config': ('lyregpt.convert_config', "convert another project's config file"),
}


def main() -> None:
    """Run the command that the command line names."""
    path = lyregpt.shadowing_file()
    if path:
        print(
            f'lyregpt: error: {path} hides the file of the same name in {lyregpt.ROOT}: rename it',
            file=sys.stderr,
        )
        sys.exit(2)
    from configurator import run

    sys.argv[0] = 'lyregpt'  # the messages' name of the program
    run(run_command)


def run_command() -> None:
    """Import the command's module and call its `main`."""
    from configurator import check_name

    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if command in ('-h', '--help'):
        print('usage: lyregpt COMMAND [options]\n')
        for name, (_, purpose) in COMMANDS.items():
            print(f'  {name:16}{purpose}')
    elif command == '--version':
        print(f'lyregpt {lyregpt.__version__}')
    else:
        check_name(command, COMMANDS, kind='command')
        sys.argv[0:2] = [f'lyregpt {command}']
        module, _ = COMMANDS[command]
        arguments = []
        if command == 'convert-config':
            arguments = [lambda: importlib.import_module('train').TrainConfig]
        importlib.import_module(module).main(*arguments)


if __name__ == '__main__':
    main()
