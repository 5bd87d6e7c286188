"""A class of which nobody knows anything, under the same name in every process."""


class Opaque:
    def __init__(self, value):
        self.value = value
