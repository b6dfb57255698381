"""The one exception for mistakes that a user can mend."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """One line that says what is wrong and what to do; the command line prints it and exits with code 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with its complaints as UserErrors: one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
