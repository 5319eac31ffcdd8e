# The command line
# Generated from book/cli/commands.py; edit the chapter, not this file.

from gptoss.weights.layout import *
from gptoss.weights.files import *
from gptoss.weights.spellings import *
from gptoss.weights.checkpoint import *
from gptoss.weights.write import *
from gptoss.weights.convert import *
from gptoss.weights.hub import *
