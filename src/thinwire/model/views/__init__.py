"""The views of a model that a run file may name: one file each, a frozen class known by its `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from thinwire.model.views.core import Core as Core
from thinwire.model.views.filter import Filter as Filter
from thinwire.model.views.full import Full as Full
from thinwire.model.views.lora import Lora as Lora
from thinwire.model.views.prompt import Prompt as Prompt
from thinwire.model.views.prompt import check_prompt as check_prompt
from thinwire.model.views.prompt import saved_in as saved_in
from thinwire.model.views.tied import Tied as Tied
from thinwire.model.views.view import Adapted as Adapted
from thinwire.model.views.view import Source as Source
from thinwire.model.views.view import View as View

AnyView = Annotated[Core | Filter | Full | Lora | Prompt | Tied, Field(discriminator="kind")]
