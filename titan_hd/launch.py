"""`python -m titan_hd.launch`: the launcher of `process.launch` under the name that users type."""

from titan_hd.process.launch import main

if __name__ == "__main__":
    main()
