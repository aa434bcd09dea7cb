"""thinwire schema: what a run file may hold, for editors that complete and check TOML."""

from __future__ import annotations

from typing import Any

from thinwire.commands.terminal import echo_json, one_line


def schema() -> None:
    """Print the JSON Schema of run files, for editors."""
    with one_line():
        echo_json(json_schema())


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a run file: methods known by `name`, one of the user's own by `path`."""
    from thinwire.config import Run
    from thinwire.methods.catalogue import catalogue

    whole = Run.model_json_schema(ref_template="#/$defs/{model}")
    definitions, fields = whole["$defs"], whole["properties"]
    kinds = []
    for name, about in catalogue().items():
        method, title = about["schema"], about["schema"]["title"]
        definitions |= method.pop("$defs", {})
        method["required"] = ["name", *(field for field in method.get("required", ()) if field != "name")]
        definitions[title] = {**method, "properties": {**method["properties"], "name": {"const": name}}}
        kinds.append({"$ref": f"#/$defs/{title}"})
    path = {"type": "string", "pattern": ".:.", "description": "package.module:Class of a method of your own"}
    own = {"type": "object", "title": "A method of your own", "properties": {"path": path}, "required": ["path"]}
    fields["method"] = {"oneOf": [*kinds, own], "title": "Method", "discriminator": {"propertyName": "name"}}
    segments = fields["cohort"]
    fields["cohort"] = {"anyOf": [segments, segments["items"]], "title": "Cohort"}  # one segment needs no list
    fields["compare"] = {"type": "object", "title": "Compare", "description": "For thinwire compare."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "A run file of thinwire"}
