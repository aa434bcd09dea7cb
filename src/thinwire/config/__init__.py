"""A run is a file: TOML, checked whole before anything runs, overridden by key=value and by nothing else."""

from thinwire.config.federation import Federation as Federation
from thinwire.config.method import method_name as method_name
from thinwire.config.method import method_of as method_of
from thinwire.config.parse import load as load
from thinwire.config.parse import override as override
from thinwire.config.parse import parse as parse
from thinwire.config.parse import read as read
from thinwire.config.schema import Data as Data
from thinwire.config.schema import Eval as Eval
from thinwire.config.schema import Model as Model
from thinwire.config.schema import Run as Run
from thinwire.config.schema import Track as Track
from thinwire.errors import ConfigError as ConfigError
from thinwire.model.views import Full as Full
from thinwire.model.views import Lora as Lora
