"""The same as pai-bench report, from a checkout."""

from pai_bench.commands.report import main

if __name__ == "__main__":
    main()
