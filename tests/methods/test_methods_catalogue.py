"""The file of methods has what the classes have, and who reads it does not wait for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import thinwire
from thinwire.methods import METHODS, PLACES
from thinwire.methods.catalogue import FILE, catalogue, written


def test_the_file_is_what_the_classes_say() -> None:
    assert FILE.read_text(encoding="utf-8") == written(), "make catalogue"
    assert list(catalogue()) == sorted(METHODS)


def test_a_method_is_found_by_its_name_here_and_in_the_package() -> None:
    for name, cls in METHODS.items():
        assert cls.model_fields["name"].default == name
        assert getattr(thinwire, cls.__name__) is cls
    assert (len(METHODS), "fedavg" in METHODS, "fedav" in METHODS) == (len(PLACES), True, False)
    with pytest.raises(KeyError):
        METHODS["fedav"]


@pytest.mark.parametrize("args", [["methods"], ["methods", "--json"], ["schema"], ["--help"]])
def test_a_list_of_methods_loads_no_library_of_tensors(args: list[str]) -> None:
    code = "import sys; from thinwire.cli import app; app(sys.argv[1:], standalone_mode=False)\n"
    code += "sys.exit(str({'torch', 'transformers', 'numba'} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert (done.stderr.strip(), bool(done.stdout)) == ("", True)


def test_the_run_file_s_module_loads_none_either() -> None:
    code = "import sys, thinwire.config as c; c.Data(path='x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
