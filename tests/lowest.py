"""Print the lowest versions of the packages that planearly needs, as constraints for pip; those of
the tools that test it are as in constraints.txt."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"[\w-]+")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for needed in [*project["dependencies"], *extras["hub"], *extras["lora"]]:
        print(needed.replace(">=", "=="))
    tools = {NAME.match(tool)[0].lower() for tool in extras["dev"]}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line.partition("==")[0].lower() in tools:
            print(line)


if __name__ == "__main__":
    main()
