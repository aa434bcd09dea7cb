"""Methods and references on the same model, data and cohorts: what is run, what it costs, and the table of it."""

from thinwire.compare.budget import price as price
from thinwire.compare.budget import settle as settle
from thinwire.compare.lineup import check_models as check_models
from thinwire.compare.lineup import check_output as check_output
from thinwire.compare.lineup import load as load
from thinwire.compare.lineup import plans as plans
from thinwire.compare.lineup import share as share
from thinwire.compare.plan import ABOUT as ABOUT
from thinwire.compare.plan import ALONE as ALONE
from thinwire.compare.plan import Plan as Plan
from thinwire.compare.plan import Settings as Settings
from thinwire.compare.plan import first_cohort as first_cohort
from thinwire.compare.table import Line as Line
from thinwire.compare.table import line as line
from thinwire.compare.table import write as write
from thinwire.compare.tune import execute as execute
from thinwire.compare.tune import recall as recall
