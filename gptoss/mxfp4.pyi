# The command line
# Generated from book/cli/commands.py; edit the chapter, not this file.

from gptoss.weights.mxfp4 import *
from gptoss.weights.encoding import *
from gptoss.model.ops import *
