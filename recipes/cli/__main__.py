"""The `marlora` command as a module: `python -m marlora.recipes.cli`."""

from marlora.recipes.cli.main import main

if __name__ == "__main__":
    main()
