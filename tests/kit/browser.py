"""Pages as a real browser shows them: Chromium without a window, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 120


def look_at(page: Path, script: str, folder: Path, dark: bool = False) -> Any:
    """What `script`, the body of a JavaScript function, returns after a page has been loaded; faults of the page's own
    scripts fail the test. Skips it where no browser is installed.

    folder: for a copy of the page and the browser's files. dark: the reader prefers dark pages.
    """
    browser = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    text = page.read_text(encoding="utf-8")
    faults = "<script>const faults = []; window.onerror = (said) => { faults.push(said); };</script>"
    seen = "document.body.appendChild(document.createElement('pre')).id = 'seen';"
    seen += f"const found = (() => {{ {script} }})();"
    seen += "document.getElementById('seen').textContent = JSON.stringify({found, faults});"
    copy = folder / "looked_at.html"
    text = text.replace("<head>", f"<head>{faults}", 1).replace("</body>", f"<script>{seen}</script></body>")
    copy.write_text(text, encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    words += ["--window-size=1280,900", f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"]
    done = subprocess.run([*words, copy.as_uri()], capture_output=True, text=True, timeout=_SECONDS, check=False)
    shown = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown is not None, f"no page: {done.stderr[-2000:]}"
    assert shown[1], "the script that looks at the page has failed"
    result = json.loads(html.unescape(shown[1]))
    assert result["faults"] == []
    return result["found"]
