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
HELP = ('-h', '--help')


def usage() -> str:
    """The list of commands."""
    lines = [f'  {name:16}{about}' for name, (_, about) in COMMANDS.items()]
    return '\n'.join(['usage: lyregpt COMMAND [options]', '', *lines])


def main() -> None:
    """Run the command that the command line names."""
    path = lyregpt.shadowed()
    if path:
        sys.exit(
            f'lyregpt: error: {path} hides the file of the same name in {lyregpt.ROOT}: rename it'
        )
    from configurator import check_name, run

    if len(sys.argv) < 2 or sys.argv[1] in HELP:
        print(usage())
        return
    sys.argv[0] = 'lyregpt'
    command = sys.argv.pop(1)
    run(lambda: check_name(command, COMMANDS, kind='command'))
    sys.argv[0] = f'lyregpt {command}'
    module = importlib.import_module(COMMANDS[command][0])
    run(module.main)


if __name__ == '__main__':
    main()
