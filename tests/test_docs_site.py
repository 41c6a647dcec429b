"""The pages of docs/ build into a site without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_site_builds_without_warnings_and_has_every_page(tmp_path):
    pytest.importorskip("sphinx", reason="Sphinx is not installed: kimi-core[docs]")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in tmp_path.glob("*.html")}
    settings = (tmp_path / "reference" / "settings.html").read_text()
    assert "trainer.learning_rate = 0.0001" in settings
    assert 'id="kimi_core.loop.Loop.iterate"' in (tmp_path / "reference/python.html").read_text()
