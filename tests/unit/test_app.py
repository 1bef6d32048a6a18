"""APP references: every form, and a clear error for everything that can be wrong with one."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from toque._app import load_app
from toque.errors import AppError

WORKFLOW = """
from toque.workflow import Workflow

class {name}(Workflow[int, str]{options}):
    async def run(self, event, step):
        return ""
"""


def workflow(name: str, options: str = "") -> str:
    return WORKFLOW.format(name=name, options=options)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty working directory; what is imported in the test is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield Project(tmp_path)
    for name in set(sys.modules) - before:
        del sys.modules[name]


class Project:
    """Writes files below the working directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))
        return file


def names(reference: str) -> dict[str, str]:
    return {name: cls.__name__ for name, cls in load_app(reference).workflows.items()}


def refusal(reference: str) -> str:
    with pytest.raises(AppError) as caught:
        load_app(reference)
    return str(caught.value)


# -- the forms ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("reference", "found"), [
    ("orders", {"Order": "Order", "refund": "Refund"}), ("orders:Refund", {"refund": "Refund"}),
    ("orders.py", {"Order": "Order", "refund": "Refund"}), ("orders.py:Order", {"Order": "Order"}),
    ("./orders.py", {"Order": "Order", "refund": "Refund"}),
])
def test_each_form_of_reference_finds_its_workflows(project, reference, found):
    """A module or a file gives all its workflows, a class after a colon only itself."""
    project.write("orders.py", workflow("Order") + workflow("Refund", ', name="refund"'))

    assert names(reference) == found


def test_a_file_elsewhere_can_import_its_neighbours(project, monkeypatch):
    """The file's folder is on the path, as it is for `python file.py`."""
    project.write("apps/shop/flow.py", "import helper\n" + workflow("Shop"))
    project.write("apps/shop/helper.py", "")

    assert names("apps/shop/flow.py") == {"Shop": "Shop"}


def test_a_file_in_a_package_can_use_relative_imports(project):
    """The file is imported under its package's name."""
    project.write("src/shop/__init__.py", "")
    project.write("src/shop/names.py", "TITLE = 'x'\n")
    project.write("src/shop/flow.py", "from .names import TITLE\n" + workflow("Shop"))

    app = load_app("src/shop/flow.py")

    assert app.workflows["Shop"].__module__ == "shop.flow"


@pytest.mark.parametrize("file", ["queue.py", "my-flow.py", "2024.py", "msgspec.py"])
def test_a_file_whose_name_is_taken_or_no_name_is_loaded_all_the_same(project, file):
    """It hides no other module of that name."""
    kept = sys.modules.get("msgspec")
    project.write(file, workflow("Shop"))

    assert names(file) == {"Shop": "Shop"}
    assert sys.modules.get("msgspec") is kept


def test_a_package_gives_the_workflows_of_its_own_modules(project):
    """What the package imports from below belongs to it; what it imports from elsewhere does not."""
    project.write("shop/__init__.py", "from shop.flow import Shop\nfrom other import Other\n")
    project.write("shop/flow.py", workflow("Shop"))
    project.write("other.py", workflow("Other"))

    assert names("shop") == {"Shop": "Shop"}


def test_imported_workflows_and_bases_are_not_collected(project):
    """Only classes that are defined there and have a run."""
    project.write("other.py", workflow("Other"))
    project.write("orders.py", workflow("Order") + dedent("""
        from other import Other
        class Base(Workflow):
            pass
        Alias = Order
    """))

    assert names("orders") == {"Order": "Order"}


def test_an_imported_workflow_can_be_named(project):
    """A class after the colon may come from anywhere."""
    project.write("other.py", workflow("Other"))
    project.write("orders.py", "from other import Other\n")

    assert names("orders:Other") == {"Other": "Other"}


# -- lifespan and files ------------------------------------------------------------------------------------------------

LIFESPAN = """
from contextlib import asynccontextmanager

@asynccontextmanager
async def lifespan():
    yield {"origin": __name__}
"""


@pytest.mark.parametrize("reference", ["orders", "orders:Order", "reexport:Order"])
def test_the_lifespan_of_the_module_is_found(project, reference):
    """Also that of the module where a class named alone was defined."""
    project.write("orders.py", LIFESPAN + workflow("Order"))
    project.write("reexport.py", "from orders import Order\n")

    lifespan = load_app(reference).lifespan

    assert lifespan is not None
    assert lifespan is sys.modules["orders"].lifespan


def test_without_a_lifespan_there_is_none(project):
    """It is optional."""
    project.write("orders.py", workflow("Order"))

    assert load_app("orders").lifespan is None


@pytest.mark.parametrize("lifespan", [
    "async def lifespan():\n    yield 1\n", "async def lifespan():\n    return 1\n", "lifespan = 5\n",
])
def test_a_lifespan_without_its_decorator_is_refused(project, lifespan):
    """The message has the decorator."""
    project.write("orders.py", workflow("Order") + lifespan)

    assert "put @contextlib.asynccontextmanager on `async def lifespan()`" in refusal("orders")


def test_files_are_the_sources_of_the_apps_own_modules(project):
    """Those below the working directory and beside the file; no installed packages, nothing of Toque."""
    project.write("orders.py", "import helper, shop.part, msgspec\n" + workflow("Order"))
    project.write("helper.py", "")
    project.write("shop/__init__.py", "")
    project.write("shop/part.py", "")
    project.write("unused.py", "")
    project.write("venv/lib/installed.py", "")

    files = load_app("orders").files

    assert [str(file.relative_to(project.root)) for file in files] == [
        "helper.py", "orders.py", "shop/__init__.py", "shop/part.py"]


def test_files_beside_an_app_elsewhere_are_watched(project, tmp_path_factory):
    """The working directory need not be the project's."""
    elsewhere = Project(tmp_path_factory.mktemp("elsewhere"))
    file = elsewhere.write("flow_elsewhere.py", "import neighbour\n" + workflow("Shop"))
    neighbour = elsewhere.write("neighbour.py", "")

    assert load_app(str(file)).files == [file, neighbour]


# -- what can be wrong -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reference", [
    "", ":", ":Order", "orders:", "orders:1x", "orders:a b", "or ders", "orders..x", "a:b:c",
])
def test_a_reference_of_no_legal_form_is_refused(project, reference):
    """The message has the forms."""
    assert re.search("is not of the form|is neither a module's name nor a path", refusal(reference))


def test_a_missing_file_is_told_with_the_working_directory(project):
    """The whole path that was looked for is in the message."""
    message = refusal("flows/orders.py")

    assert "no file flows/orders.py" in message
    assert str(project.root / "flows/orders.py") in message
    assert f"working directory {project.root}" in message


def test_a_folder_is_told(project):
    """A folder is no file."""
    (project.root / "flows").mkdir()

    assert "flows/ is a folder; name a .py file in it" in refusal("flows/")


@pytest.mark.parametrize("name", ["nowhere", "nowhere.flow", "shop.flow"])
def test_a_missing_module_is_told_with_the_working_directory(project, name):
    """What was looked for, and where; a missing part of a package too."""
    project.write("shop/__init__.py", "")

    message = refusal(name)

    assert f"no module '{name}'" in message
    assert f"looked for {name.replace('.', '/')}.py" in message
    assert f"directory {project.root}" in message


def test_a_missing_import_inside_the_app_is_told_apart(project):
    """The app is there, but what it imports is not: another remedy."""
    file = project.write("orders.py", "\n\nimport not_installed\n")

    message = refusal("orders")

    assert message.startswith("importing orders raised ModuleNotFoundError: No module named 'not_installed'")
    assert f"{file}:3: import not_installed" in message


@pytest.mark.parametrize("reference", ["orders", "orders.py", "my-orders.py"])
def test_an_import_that_raises_is_told_with_the_users_line(project, reference):
    """Type, message, file, line and source."""
    text = "import helper\n"
    project.write("orders.py", text)
    project.write("my-orders.py", text)
    helper = project.write("helper.py", "def load():\n    raise KeyError('TOKEN')\n\nload()\n")

    message = refusal(reference)

    assert "raised KeyError: 'TOKEN'" in message
    assert f"{helper}:2: raise KeyError('TOKEN')" in message


def test_the_users_line_is_shown_when_a_library_raises(project):
    """The last line of the user's own counts, not the library's."""
    file = project.write("orders.py", "import json\n\njson.loads('{')\n")

    assert f"{file}:3: json.loads('{{')" in refusal("orders")


def test_the_users_line_is_shown_when_toque_refuses_a_class(project):
    """A class that is no workflow is told with the line where it stands, not with that of the check."""
    file = project.write("orders.py", """from toque.workflow import Workflow

class Order(Workflow[int, str]):
    def run(self, event, step):
        return ""
""")

    message = refusal("orders")

    assert "Order.run must be written `async def run(self, event, step)`" in message
    assert f"{file}:3: class Order(Workflow[int, str]):" in message


def test_a_syntax_error_is_told_with_its_line(project):
    """The line that does not parse."""
    file = project.write("orders.py", "x = 1\ndef broken(:\n")

    message = refusal("orders")

    assert "raised SyntaxError" in message
    assert f"{file}:2: def broken(:" in message


@pytest.mark.parametrize("reference", ["orders", "orders.py", "shop-orders.py", "pkg/part.py"])
def test_an_app_that_exits_when_imported_is_told(project, reference):
    """A script without a main guard does not end the pod silently."""
    for path in ("orders.py", "shop-orders.py", "pkg/__init__.py", "pkg/part.py"):
        project.write(path, "import sys\nsys.exit(3)\n")

    assert "raised SystemExit: 3" in refusal(reference)


def test_a_failed_import_leaves_no_half_of_a_module(project):
    """After the file is mended it loads."""
    file = project.write("my-orders.py", "1 / 0\n")
    assert "ZeroDivisionError" in refusal("my-orders.py")

    file.write_text(workflow("Order"))

    assert names("my-orders.py") == {"Order": "Order"}


def test_a_missing_class_is_told_with_those_there(project):
    """A misspelt name is seen at once."""
    project.write("orders.py", workflow("Order") + workflow("Refund"))

    assert "has no 'Ordr'; workflows there: Order, Refund" in refusal("orders:Ordr")


@pytest.mark.parametrize(("attribute", "message"), [
    ("Thing", "'Thing' in {file} is the class, not a subclass of toque.Workflow; no workflow is there, only Thing"),
    ("value", "'value' in {file} is a int, not a subclass of toque.Workflow"),
])
def test_what_is_no_workflow_is_told(project, attribute, message):
    """What it is instead, and what else is there."""
    file = project.write("orders.py", "class Thing: pass\nvalue = 5\n")

    assert message.format(file=file) in refusal(f"orders:{attribute}")


def test_a_workflow_without_run_is_told(project):
    """A base cannot be run."""
    project.write("orders.py", "from toque.workflow import Workflow\nclass Base(Workflow): pass\n")

    assert "'Base' in " in refusal("orders:Base")
    assert "has no `async def run(self, event, step)`" in refusal("orders:Base")


def test_a_module_without_workflows_is_told(project):
    """What it only imports is mentioned, because it may have been meant."""
    project.write("other.py", workflow("Other"))
    project.write("orders.py", "from other import Other\n")

    message = refusal("orders")

    assert message.startswith("no workflow found in orders")
    assert "it only imports, or has no run for, other.Other" in message


def test_two_workflows_of_one_name_are_refused(project):
    """Both classes are named."""
    project.write("orders.py", workflow("Order", ', name="x"') + workflow("Refund", ', name="x"'))

    assert "two workflows are named 'x': orders.Order and orders.Refund" in refusal("orders")


def test_a_class_that_needs_arguments_is_refused(project):
    """It would fail at the first instance; the message says where to share objects."""
    project.write("orders.py", workflow("Order") + "\n    def __init__(self, pool): ...\n")

    message = refusal("orders")

    assert "orders.Order cannot be made without arguments (pool)" in message
    assert "lifespan" in message


def test_a_params_type_that_names_nothing_is_refused(project):
    """It would fail at the first creation."""
    project.write("orders.py", workflow("Order").replace("Workflow[int, str]", 'Workflow["Nope", str]'))

    assert "the type 'Nope' in the bases of Order cannot be resolved" in refusal("orders")
