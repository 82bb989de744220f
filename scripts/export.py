"""The same as pai-bench export, from a checkout."""

from pai_bench.commands.export import main

if __name__ == "__main__":
    main()
