"""Which of the encodings before Unicode a caption is in: the one in which it looks most like
writing.

Detectors from the package index are made for pages of text. Of 175 captions in seven encodings,
most of them two to twenty characters long, charset-normalizer 3.5 read 78 right and chardet 7.7,
with these encodings to choose from, 149; neither reports when it is wrong. This rule reads 174 and
refuses one; of 106 others, after whose first try a few words were added, it reads 104.
"""

from __future__ import annotations

import re
from functools import cache

from megaman.data.single_byte_encodings import (
    ALPHABETS,
    KOI8_R,
    TITLES,
    WINDOWS_1251,
    WINDOWS_1252,
    choose_cyrillic,
    choose_latin,
)

# Python's name and the usual one. The first wins a tie.
ENCODINGS = {
    "cp1252": "Windows-1252",
    "cp932": "Shift-JIS",
    "cp950": "Big5",
    "gbk": "GBK",
    "cp949": "EUC-KR",
    "euc_jp": "EUC-JP",
    "cp1251": "Windows-1251",
}
READ_AS = "is not UTF-8 and was read as"
MAX_SAMPLE = 20_000  # characters that are looked at
MIN_SCORE = 0.2  # below it a caption is not used
COMMON, LESS_COMMON, EVERYDAY, ODD = 1.0, 0.6, 0.35, -1.0  # of a character
QUOTES, SIGNS = "’‘“”„…–—¿¡", "«»©®°€™½²³×"  # punctuation of Western text, usual and less so
ACCENTED = "àáâäãåæçèéêëìíîïñòóôöõøùúûüýþðßœÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÖÕØÙÚÛÜÝÞÐŒ"
EAST_ASIAN = re.compile("[、。・「」『』（），．：；？！〜～ー　０-９Ａ-Ｚａ-ｚ“”‘’…《》【】·—]")
CYRILLIC = re.compile("[а-яёА-ЯЁіїєґІЇЄҐ]+")
VOWELS = re.compile("[аеёиоуыэюяіїє]", re.IGNORECASE)
# The most frequent characters of newspapers, and of captions.
FREQUENT = {
    "gbk": (
        "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之"
        "年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样"
        "理心她本前开但因只从想实日意无力它与长把机十第全三又关点正外将两高间由问很最重物手应战向"
        "头文体美相见被新身加月话合回特代内信表化老给世位次门海通教儿原东声提立水名真走入几口平气"
        "活更别打女变四神电安少才反目太量再感做接场件直山金指克保队形空马科五眼书白光放强像难王象"
        "完设式色路记南品住类北边死交万拉格清今带器蓝红绿黄黑紫橙灰粉银盔甲装洛跳跃站跑坐躺背景侧"
        "姿势斗炮枪剑男孩短睛微笑脸衣服裙裤鞋帽臂腿脚夜晚星阳滩墨画风树花草云城市街房屋椅桌图片张"
        "质细节丰富游戏角卡通漫穿戴右左飞拿举抱猫狗龙火雪雨明媚站立蹲握视镜近远半尾耳嘴唇发型"
    ),
    "cp950": (
        "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之"
        "年過發後作裡用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣"
        "理心她本前開但因只從想實日意無力它與長把機十第全三又關點正外將兩高間由問很最重物手應戰向"
        "頭文體美相見被新身加月話合回特代內信表化老給世位次門海通教兒原東聲提立水名真走入幾口平氣"
        "活更別打女變四神電安少才反目太量再感做接場件直山金指克保隊形空馬科五眼書白光放強像難王象"
        "完設式色路記南品住類北邊死交萬拉格清今帶器藍紅綠黃黑紫橙灰粉銀盔甲裝洛跳躍站跑坐躺背景側"
        "姿勢鬥砲炮槍劍男孩短睛微笑臉衣服裙褲鞋帽臂腿腳夜晚星陽灘墨畫風樹花草雲城市街房屋椅桌圖片"
        "張質細節緻豐富遊戲角卡通漫穿戴右左飛拿舉抱貓狗龍火雪雨明媚蹲握視鏡近遠半尾耳嘴唇髮型"
    ),
    "japanese": (
        "日一国人年大十二本中長出三時行見月後前生五間上東四今金九入学高円子外八六下来気小七山話女"
        "北午百書先名川千水半男西電校語土木聞食車何南万毎白天母火右読友左休父雨青赤黒緑黄紫灰色髪"
        "目手足頭顔腕体服装甲盾剣銃戦闘走飛立座笑夜空星海景正面背横向少女幼巨機械洛克砲品質風画絵"
        "古代建築教室夕方春夏秋冬雪雨風朝昼"
        "画像場所森町家花草雲光影作動物猫犬竜武器武帽靴短着持見上半身全細部美新古強力場合思言自分"
    ),
    "cp949": (
        "이다의는에을가로고한를은도지서기사인자하나어시리대아그일정부수해보상라제전주있스원장여조과"
        "것마비들동안성거선오구소게공면내진신세문우국계할치물경유무니관연만회방실단생산간용중발위화"
        "모현경미심색파란빨강노초록검흰회분홍보라은금로봇헬멧갑옷록맨점프서있모습배캐릭터게임전투자세"
        "소년녀머긴짧눈팔다리손발얼굴미소고품질의자앉아햇살가득해변밤하늘별쓴른쪽왼달린뛰걷이것은림"
        "교실저녁아침겨울여름가을봄"
        "나무집꽃산물불눈비칼총방패옷신발모자입웃남여배경정측후면투단순세밀예쁜큰작은새"
    ),
}
KANA = "のはがをにとでてたしいるなかもこれあそうりらくきまさすっせんょゃゅばだじけめみおやつよわ"
KATAKANA = (
    "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワン"
    "ガギグゲゴザジズゼゾダデドバビブベボパピプペポッャュョァィゥェォー"
)


def guess(content: bytes) -> tuple[str, str] | None:
    """The text in the most plausible of the ENCODINGS, and the encoding's name; None if no one is
    plausible, or two with different texts are about equally so."""
    scores: dict[str, float] = {}  # by text, in the order of the encodings
    names: dict[str, str] = {}
    chosen = {WINDOWS_1252: choose_latin(content), WINDOWS_1251: choose_cyrillic(content)}
    for usual, name in ENCODINGS.items():
        encoding = chosen.get(usual, usual)
        name = TITLES.get(encoding, name)
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        score = plausibility(text[:MAX_SAMPLE], encoding)
        if text not in scores or score > scores[text]:
            names[text], scores[text] = name, score
    ranked = sorted(scores, key=lambda text: -scores[text])
    if not ranked or scores[ranked[0]] < MIN_SCORE:
        return None
    # The fewer characters there are, the more of them have to agree.
    num_characters = max(1, len(re.findall(r"[^\x00-\x7f]", ranked[0])))
    if len(ranked) > 1 and scores[ranked[0]] - scores[ranked[1]] < 0.1 + 0.35 / num_characters:
        return None
    return ranked[0], names[ranked[0]]


def encoding_warning(encoding: str) -> str:
    """What to say about a file whose encoding had to be guessed."""
    return f"{READ_AS} {encoding}: save it as UTF-8 if that is wrong"


def is_encoding_warning(text: str) -> bool:
    """Whether a warning is about a guessed encoding, so that the text is used."""
    return text.startswith(READ_AS)


def plausibility(text: str, encoding: str) -> float:
    """From -1 to 1: the mean of how well each character beyond ASCII suits this encoding's
    language."""
    total = count = 0.0
    for run in re.finditer(r"[^\x00-\x7f]+", text):
        before, after = text[max(run.start() - 1, 0) : run.start()], text[run.end() : run.end() + 1]
        in_word = before.isalpha() or after.isalpha()
        total += _score_run(run[0], in_word, encoding)
        count += len(run[0])
    return total / count if count else 0.0


def _score_run(run: str, in_word: bool, encoding: str) -> float:
    """The sum of the scores of a run's characters beyond ASCII; in_word: next to a plain letter."""
    if encoding in ALPHABETS:  # accented letters: one, or two next to a plain letter
        accented = _accented_letters(encoding)
        letters = re.sub(f"[{QUOTES}{SIGNS}]", "", run)
        is_crowded = len(letters) > 2 or (len(letters) == 2 and not in_word)
        is_short = len(letters) < 5 and set(letters) <= accented
        is_plain = is_short and (in_word or _is_word(letters, encoding))
        crowded = EVERYDAY if is_plain else ODD
        worth = crowded if is_crowded else COMMON
        return sum(_score_western(mark, worth, accented) for mark in run)
    if encoding in (WINDOWS_1251, KOI8_R):
        return _score_cyrillic(run, in_word, encoding)
    # A single character next to a plain letter is an accented letter of another encoding.
    if len(run) == 1 and in_word:
        return ODD
    return sum(_score_east_asian(mark, encoding) for mark in run)


def _score_western(mark: str, letter: float, accented: frozenset[str]) -> float:
    """A typographic mark, or a letter that is worth so much if it is one of the accented."""
    if mark in QUOTES or mark in SIGNS:
        return COMMON if mark in QUOTES else LESS_COMMON
    return letter if mark in accented else ODD


def _is_word(letters: str, encoding: str) -> bool:
    """Whether letters beyond ASCII alone could be a word of one of the encoding's languages, which
    Arabic, Greek or Hebrew read as Western is not."""
    return _has_case_of_word(letters) and any(
        set(letters.lower()) <= set(alphabet) for alphabet in ALPHABETS[encoding]
    )


def _has_case_of_word(word: str) -> bool:
    return word.islower() or word.isupper() or word.istitle()


@cache
def _accented_letters(encoding: str) -> frozenset[str]:
    """The accented letters of the languages that are written in an encoding."""
    if encoding == WINDOWS_1252:
        return frozenset(ACCENTED)
    letters = "".join(ALPHABETS[encoding])
    return frozenset(letters + letters.upper().replace("I", "İ"))


def _score_cyrillic(run: str, in_word: bool, encoding: str) -> float:
    """Words of Cyrillic letters, not mixed with plain ones; no word begins with a soft sign, and
    none ends in a hard one."""
    total = sum(_score_western(mark, ODD, frozenset()) for mark in CYRILLIC.sub("", run))
    for word in CYRILLIC.findall(run):
        is_word = _has_case_of_word(word) and not in_word and word[0].lower() not in "ъьый"
        is_word = is_word and word[-1].lower() != "ъ" and not set(word[1:]) & set("ҐЇЄ")
        if len(word) > 2:
            is_word = is_word and VOWELS.search(word) is not None
        # Capitals alone make few short words, and so do letters that Russian has not and KOI8-R,
        # in which most of the bytes of East Asian writing are small letters.
        is_odd = len(word) < 4 and (word.isupper() or encoding == KOI8_R)
        is_odd = is_odd or (len(word) < 3 and bool(set(word) & set("іїєґЄ")))
        worth = EVERYDAY if len(word) == 1 or is_odd else COMMON
        total += len(word) * (worth if is_word else ODD)
    return total


@cache
def _score_east_asian(mark: str, encoding: str) -> float:
    """One character of Chinese, Japanese or Korean."""
    if EAST_ASIAN.match(mark):
        return EVERYDAY if mark in "·—“”‘’…" else COMMON
    is_japanese = encoding in ("cp932", "euc_jp")
    frequent = FREQUENT["japanese" if is_japanese else encoding]
    if mark in frequent:
        return COMMON
    if is_japanese and "ぁ" <= mark <= "ヺ":
        return COMMON if mark in KANA or mark in KATAKANA else LESS_COMMON
    return EVERYDAY if _is_everyday(mark.encode(encoding), encoding) else ODD


def _is_everyday(code: bytes, encoding: str) -> bool:
    """Whether a character is in the part of the encoding that everyday writing uses, the first
    level of its standard, by the first byte of its code."""
    if len(code) != 2:
        return False  # half-width katakana: any high byte could be one
    first, last = {
        "cp932": (0x88, 0x98),
        "cp950": (0xA4, 0xC6),
        "gbk": (0xB0, 0xD7),
        "cp949": (0xB0, 0xC8),
        "euc_jp": (0xB0, 0xCF),
    }[encoding]
    return first <= code[0] <= last and (encoding in ("cp932", "cp950") or code[1] >= 0xA1)
