# The command line
# Generated from book/cli/commands.py; edit the chapter, not this file.

from gptoss.text.vocabulary import *
from gptoss.text.tokenizer import *
from gptoss.text.typescript import *
from gptoss.text.harmony import *
from gptoss.text.template import *
from gptoss.text.parser import *
