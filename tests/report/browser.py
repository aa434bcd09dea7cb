"""A headless Chromium that shows a page: its width, its colours, its console."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


class Page:
    """A report in the browser, of a file or at an address."""

    def __init__(self, driver: Any, file: Path | str) -> None:
        self.driver = driver
        driver.get(file.resolve().as_uri() if isinstance(file, Path) else file)
        self.ready(1)

    def ready(self, times: int) -> None:
        """Wait until the plots have been drawn so often."""
        script = "return Number(document.documentElement.dataset.ready ?? 0)"
        WebDriverWait(self.driver, 60).until(lambda d: d.execute_script(script) >= times)

    def drawn(self) -> int:
        """How often the plots have been drawn."""
        return int(self.driver.execute_script("return Number(document.documentElement.dataset.ready)"))

    def pick(self, name: str, value: str) -> None:
        """Choose a radio button as a click does, and wait for the plots."""
        before = self.drawn()
        self.driver.find_element(By.CSS_SELECTOR, f'input[name="{name}"][value="{value}"]').click()
        self.ready(before + 1)

    def look(self, width: int, dark: bool) -> None:
        """Show the page at a width in CSS pixels, light or dark, and wait for the plots."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.refresh()
        self.ready(1)

    def shoot(self, file: Path) -> None:
        """A picture of the whole page."""
        import base64

        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """What the console has complained of since it was last asked."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver, closed at the end."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
