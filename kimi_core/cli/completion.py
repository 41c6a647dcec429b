"""``kimi completion``: what a shell needs to complete commands, configs and settings."""

from collections.abc import Sequence

from kimi_core.cli.help import COMPLETION
from kimi_core.cli.settings import parser_of, shipped
from kimi_core.config.names import settings

BASH = """\
_kimi() {{
  local word=${{COMP_WORDS[COMP_CWORD]}}
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  COMPREPLY=($(compgen -W "{words}" -- "$word"))
  case ${{COMPREPLY[0]}} in *=) compopt -o nospace 2> /dev/null ;; esac
}}
complete -o default -F _kimi kimi
"""
"""`default`: names of files where no word of ours fits."""

ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(commands: Sequence[str], arguments: Sequence[str]) -> int:
    """Print the script of one shell, which completes ``commands`` and what they take."""
    parser = parser_of("completion", COMPLETION)
    parser.add_argument("shell", choices=["bash", "zsh"])
    shell = parser.parse_args(arguments).shell
    keys = [f"{key}=" for key, one in settings().items() if not one.is_section]
    script = BASH.format(commands=" ".join(commands), words=" ".join([*shipped(), *keys]))
    print((ZSH if shell == "zsh" else "") + script, end="")
    return 0
