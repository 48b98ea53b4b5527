"""python -m zq"""

from zq.cli.main import main

if __name__ == "__main__":
    main()
