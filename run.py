"""Runs one experiment, or with -m a sweep: python run.py pruner=synflow sparsity=0.98."""

from pai_bench.launch.cli import main

if __name__ == "__main__":
    main()
