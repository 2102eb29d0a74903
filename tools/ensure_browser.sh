#!/bin/sh
# The browser tests open the rendered book in headless Chromium. Install it where that takes no question, else say how.
if command -v chromedriver >/dev/null 2>&1; then
    for browser in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$browser" >/dev/null 2>&1 && exit 0
    done
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing chromium and chromium-driver for the browser tests"
    if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; then
        exit 0
    fi
fi
how="on Debian or Ubuntu: sudo apt-get install chromium chromium-driver; on a Mac: brew install --cask chromium chromedriver"
if [ "${CI:-}" = true ]; then
    echo "error: the browser tests need chromium and chromedriver ($how)" >&2
    exit 1
fi
echo "chromium or chromedriver is missing, so the browser tests will be skipped ($how)"
