"""modules.shared_total_tqdm: the bar on the console."""


class TotalTQDM:
    def update(self):
        pass

    def updateTotal(self, new_total):
        pass
