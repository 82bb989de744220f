"""The same as pai-bench verify, from a checkout."""

from pai_bench.commands.verify import main

if __name__ == "__main__":
    main()
