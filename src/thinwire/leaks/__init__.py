"""What leaks: what a server rebuilds from a reply, and what canaries show of a whole run."""

from thinwire.leaks.audit import Audit as Audit
from thinwire.leaks.audit import Row as Row
from thinwire.leaks.audit import Size as Size
from thinwire.leaks.audit import record as record
