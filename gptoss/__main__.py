"""The command line

Generated from book/cli/commands.py; edit the chapter, not this file.
"""

import sys

from gptoss.cli import commands

# --- From arguments to an exit code ------------------------------------------

if __name__ == "__main__" and __package__ == "gptoss":
    sys.exit(commands.main())
