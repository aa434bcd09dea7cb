"""From a run file to the parts of a run: rows, model, data sets, scores, job, card."""

from thinwire.assemble.card import card as card
from thinwire.assemble.datasets import check_answers as check_answers
from thinwire.assemble.datasets import check_context as check_context
from thinwire.assemble.datasets import check_tokens as check_tokens
from thinwire.assemble.datasets import client_data as client_data
from thinwire.assemble.datasets import clients_data as clients_data
from thinwire.assemble.datasets import dataset as dataset
from thinwire.assemble.datasets import public_data as public_data
from thinwire.assemble.job import Start as Start
from thinwire.assemble.job import begin as begin
from thinwire.assemble.job import fingerprints as fingerprints
from thinwire.assemble.job import identity as identity
from thinwire.assemble.job import job as job
from thinwire.assemble.job import prepared as prepared
from thinwire.assemble.model import classes_of as classes_of
from thinwire.assemble.model import net_of as net_of
from thinwire.assemble.model import settled as settled
from thinwire.assemble.model import use_threads as use_threads
from thinwire.assemble.rows import Rows as Rows
from thinwire.assemble.rows import in_words as in_words
from thinwire.assemble.rows import rows_of as rows_of
from thinwire.assemble.rows import template_of as template_of
from thinwire.assemble.scores import prompts_of as prompts_of
from thinwire.assemble.scores import scorer as scorer
from thinwire.assemble.scores import splits_of as splits_of
