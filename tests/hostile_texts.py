"""40 responses that try to do something when they are shown."""

SET = "window.hacked=1"
"""What each script would do: tests look for it."""

MARKUP = [
    f"<script>{SET}</script>",
    f"<img src=x onerror='{SET}'>",
    f"<svg onload={SET}>",
    f"<svg><script>{SET}</script></svg>",
    f"<iframe srcdoc='<script>parent.{SET}</script>'></iframe>",
    f"<iframe src='javascript:{SET}'></iframe>",
    f"<a href='javascript:{SET}' autofocus onfocus='{SET}'>click</a>",
    f"<body onload='{SET}'>",
    f"<details open ontoggle='{SET}'>",
    f"<video><source onerror='{SET}'></video>",
    f"<input autofocus onfocus='{SET}'>",
    f"<math><mtext><table><mglyph><style><img src=x onerror='{SET}'>",
    f"</pre></div></main><script>{SET}</script>",
    f"--></textarea></title></style><script>{SET}</script>",
    f"<!--<img src='--><img src=x onerror={SET}//'>",
    f"<template><script>{SET}</script></template>",
    f"<noscript><p title='</noscript><img src=x onerror={SET}>'>",
    f"<object data='javascript:{SET}'></object>",
    f"<embed src='data:text/html,<script>parent.{SET}</script>'>",
    "<meta http-equiv='refresh' content='0;url=https://example.com/'>",
    "<base href='https://example.com/'>",
    "<link rel=stylesheet href='https://example.com/x.css'>",
    "<style>body{display:none}</style>",
    "<form action='https://example.com/'><button>send</button></form>",
    "<img src='https://example.com/pixel.png'>",
]

STRINGS = [
    f"');{SET};//",
    f'");{SET};//',
    f"`${{{SET}}}`",
    f"{{{{constructor.constructor('{SET}')()}}}}",
    f"__proto__[x]={SET}",
    "\u2028\u2029line separators",
    '","prompt_ids":[1],"x":"',
    '\\","token_ids":[',
]

CHARACTERS = [
    "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b5m",
    "access\u202egnp.exe\u2066hidden\u2069\u200f\u061c",
    "NUL\x00in\x00the\x00middle\x08\x7f",
    "zero\u200bwidth\u200d\ufeff\u00ad\U000e0041\U000e0042",
    "Z" + "\u0301\u0489\u0335" * 300,
    "lone \ud800 surrogate \udfff",
    "one line " + "x" * 2_000_000,
]

HOSTILE = MARKUP + STRINGS + CHARACTERS
