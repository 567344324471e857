"""python -m longwave.cli"""

from longwave.cli import app

if __name__ == "__main__":
    app()
