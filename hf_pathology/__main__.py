"""`python -m hf_pathology`, the same as `hf-pathology`."""

from .cli import main


if __name__ == "__main__":
    main()
