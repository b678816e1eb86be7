"""The classes of the data sets by name, as the Hugging Face hub lists them: label 0 first."""


def plain(name: str) -> str:
    """Return the letters and digits of a name: copies of a data set differ in spaces, hyphens and capitals."""
    return "".join(c for c in name.lower() if c.isalnum())


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FASHION_MNIST = _names("T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot")
CIFAR10 = _names("airplane automobile bird cat deer dog frog horse ship truck")
CIFAR100 = _names(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""
)
