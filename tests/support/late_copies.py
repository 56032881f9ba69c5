"""A copier whose copies end some token boundaries after they began, without a device."""

import random


class Late:
    """Copies that take some token boundaries, and leave noise where they have not been yet."""

    def __init__(self, seed, most=3):
        self.random, self.most = random.Random(seed), most
        self.bytes = 0
        self.under_way = []

    def follow(self):
        pass

    def copy(self, source, target):
        target.random_(0, 256)
        self.bytes += len(source)
        ticket = Ticket(self, source, target, self.random.randint(0, self.most))
        self.under_way.append(ticket)
        return ticket

    def write(self, values, target):
        target.copy_(values)

    def read(self, source):
        return source.clone(), Ticket(self, source, None, self.random.randint(0, 1))


class Ticket:
    def __init__(self, copier, source, target, asked):
        self.source, self.target, self.asked = source, target, asked

    def done(self):
        self.asked -= 1
        if self.asked < 0:
            self.join()
        return self.asked < 0

    def join(self):
        if self.target is not None:
            self.target.copy_(self.source)
        self.asked = -1
