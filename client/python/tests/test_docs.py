"""What the pages say runs as it stands there."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_the_example_of_the_page_runs(in_place, tmp_path):
    page = (ROOT / "docs/python.md").read_text()
    program = tmp_path / "example.py"
    program.write_text(page.split("```python\n")[1].split("\n```")[0])
    said = subprocess.run([sys.executable, program, in_place.socket], capture_output=True, text=True, check=True).stdout
    assert "(4, 64) missed at most" in said and len(said.splitlines()) == 2


def test_stubs_and_docstrings_have_everything_that_the_module_has():
    import kvoyant

    stubs = (pathlib.Path(kvoyant.__file__).parent / "_kvoyant.pyi").read_text()
    for name in ("Model", "Sequence", "Pending", "Ready", "Rows"):
        kind = getattr(kvoyant, name)
        assert kind.__doc__, name
        body = stubs.split(f"\nclass {name}:")[1].split("\nclass ")[0]
        for member, what in vars(kind).items():
            if not member.startswith("_"):
                assert f"def {member}(" in body, f"{name}.{member} has no stub"
                assert what.__doc__, f"{name}.{member} has no docstring"
    assert kvoyant.connect.__doc__ and (pathlib.Path(kvoyant.__file__).parent / "py.typed").exists()
