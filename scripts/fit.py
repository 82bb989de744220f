"""The same as pai-bench fit, from a checkout."""

from pai_bench.commands.fit import main

if __name__ == "__main__":
    main()
