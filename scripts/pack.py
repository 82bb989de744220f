"""The same as pai-bench pack, from a checkout."""

from pai_bench.commands.pack import main

if __name__ == "__main__":
    main()
