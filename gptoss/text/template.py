"""Tokens and harmony

Generated from book/11_harmony.py; edit the chapter, not this file.
"""

from collections.abc import Iterable

from gptoss.text.harmony import (
    Message,
    developer_message,
    render,
    system_message,
)
from gptoss.text.tokenizer import HarmonyError, Tokenizer

# --- A conversation ----------------------------------------------------------

def chat_prompt(tokenizer: Tokenizer, messages: Iterable[object],
                tools: Iterable[object] = (), effort: str = "medium",
                date: str | None = None, reply: bool = True) -> list[int]:
    """Token ids of a conversation in OpenAI's dicts, or in `Message`s.

    To dicts a system message is added (`date`: None for today, "" for none)
    and the developer message that their instructions and `tools` (dicts or
    functions) make, as `Chat` does; `Message`s are taken as they stand.
    `reply`: end in `<|start|>assistant`. Raises HarmonyError, or ChatError
    naming the message.
    """
    messages, tools = list(messages), list(tools)
    if messages and all(isinstance(each, Message) for each in messages):
        if tools:
            raise HarmonyError("tools: expected none beside messages of "
                               "harmony, whose developer message has them")
        return render(tokenizer, messages, reply, "turns")
    from gptoss.chat.calculator import today
    from gptoss.chat.messages import read_messages
    from gptoss.chat.tools import read_tools

    # the reader wants the user to have the last word; for a conversation
    # that nobody is to answer it gets one, which is taken out again
    closing = [] if reply else [{"role": "user", "content": ""}]
    instructions, said = read_messages([*messages, *closing])
    offered = [offer.tool for offer in read_tools(tools).values()]
    date = today() if date is None else date or None
    head = [system_message(effort, date, bool(offered)),
            developer_message(instructions, offered)]
    said = said[:len(said) - len(closing)]
    return render(tokenizer, [*filter(lambda each: each.content, head),
                              *said], reply, "turns")


# --- The same as a template --------------------------------------------------

CHAT_TEMPLATE = r'''
{#- Messages in OpenAI's dicts as harmony text. Variables: messages, tools,
    add_generation_prompt, reasoning_effort, date ("" for none), and
    model_identity. -#}
{%- macro plain(text) -%}
    {#- A tokenizer that reads the finished text cannot tell whose <|end|> it
        is: text that spells a control token is refused. -#}
    {%- for name in ["startoftext", "endoftext", "return", "constrain",
                     "channel", "start", "end", "message", "call",
                     "endofprompt"] -%}
        {%- if "<|" ~ name ~ "|>" in text -%}
            {{- raise_exception("text that spells the control token <|"
                                ~ name ~ "|>") -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if "<|reserved_" in text -%}
        {{- raise_exception("text that spells a reserved control token") -}}
    {%- endif -%}
    {{- text -}}
{%- endmacro -%}

{%- macro said(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro default(schema, bare) -%}
    {%- if "default" in schema -%}
        {%- set value = schema["default"] -%}
        {%- if value is string and not schema.enum -%}
            {{- 'default: "' ~ value ~ '"' -}}
        {%- elif value is string and bare -%}
            {{- "default: " ~ value -}}
        {%- else -%}
            {{- "default: " ~ (value | tojson(separators=(",", ":"))) -}}
        {%- endif -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro union(variants, indent, about, above, bare) -%}
    {%- for each in variants -%}
        {%- set note = namespace(parts=[]) -%}
        {%- if each.description is string and each.description != about
               and not (above and loop.first) -%}
            {%- set note.parts = [each.description] -%}
        {%- endif -%}
        {%- if "default" in each -%}
            {%- set note.parts = note.parts + [default(each, bare)] -%}
        {%- endif -%}
        {{- "\n" ~ indent ~ " | " ~ nullable(each, indent ~ "   ") -}}
        {{- " // " ~ note.parts | join(" ") if note.parts else "" -}}
    {%- endfor -%}
{%- endmacro -%}

{%- macro nullable(schema, indent) -%}
    {%- set text = type(schema, indent) -%}
    {{- text -}}
    {{- " | null" if schema.nullable and "null" not in text else "" -}}
{%- endmacro -%}

{%- macro property(name, schema, indent) -%}
    {%- set mark = "\n" ~ indent ~ "//" -%}
    {%- set one = schema.oneOf -%}
    {%- if schema.title is string -%}
        {{- mark ~ " " ~ schema.title ~ mark -}}
    {%- endif -%}
    {%- if not one and schema.description is string -%}
        {{- mark ~ " " ~ schema.description -}}
    {%- endif -%}
    {%- if schema.examples -%}
        {{- mark ~ " Examples:" -}}
        {%- for each in schema.examples if each is string -%}
            {{- mark ~ ' - "' ~ each ~ '"' -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if one -%}
        {%- set about = schema.description -%}
        {%- set shown = about is string and about != one[0].description -%}
        {{- mark ~ " " ~ about if shown else "" -}}
        {{- mark ~ " " ~ default(schema, true) if "default" in schema
            else "" -}}
        {{- "\n" ~ indent ~ name ~ ":" -}}
        {{- union(one, indent, about, shown, true) -}}
        {{- "\n" ~ indent ~ "," -}}
    {%- else -%}
        {{- "\n" ~ indent ~ name ~ ": " -}}
        {{- nullable(schema, indent ~ "    ") ~ "," -}}
        {{- " // " ~ default(schema, true) if "default" in schema else "" -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro type(schema, indent) -%}
    {%- set names = {"number": "number", "integer": "number",
                     "boolean": "boolean"} -%}
    {%- set kind = schema.type -%}
    {%- if schema.oneOf -%}
        {{- union(schema.oneOf, indent, none, false, false) -}}
    {%- elif kind == "object" -%}
        {%- if schema.description is string -%}
            {{- indent ~ "// " ~ schema.description ~ "\n" -}}
        {%- endif -%}
        {{- "{" -}}
        {%- for name, each in (schema.properties or {}).items() -%}
            {%- set mark = "" if name in (schema.required or []) else "?" -%}
            {{- property(name ~ mark, each, indent) -}}
        {%- endfor -%}
        {{- "\n" ~ indent ~ "}" -}}
    {%- elif kind == "array" -%}
        {{- type(schema["items"], indent) ~ "[]" if "items" in schema
            else "Array<any>" -}}
    {%- elif kind == "string" -%}
        {%- if schema.enum -%}
            {{- '"' ~ schema.enum | join('" | "') ~ '"' -}}
        {%- else -%}
            {{- "string" -}}
        {%- endif -%}
    {%- elif kind is string -%}
        {{- names[kind] or "any" -}}
    {%- elif kind -%}
        {%- for each in kind -%}
            {{- names[each] or each -}}
            {{- "" if loop.last else " | " -}}
        {%- endfor -%}
    {%- else -%}
        {{- "any" -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro functions() -%}
    {{- "# Tools\n\n## functions\n\nnamespace functions {\n\n" -}}
    {%- for entry in tools -%}
        {%- set tool = entry.function or entry -%}
        {%- if tool.description -%}
            {%- set about = tool.description.replace("\r\n", "\n") -%}
            {%- for line in about.removesuffix("\n").split("\n") -%}
                {{- "// " ~ line ~ "\n" -}}
            {%- endfor -%}
        {%- endif -%}
        {{- "type " ~ tool.name ~ " = (" -}}
        {{- "_: " ~ type(tool.parameters, "") if tool.parameters else "" -}}
        {{- ") => any;\n\n" -}}
    {%- endfor -%}
    {{- "} // namespace functions" -}}
{%- endmacro -%}

{%- macro message(header, content, stop="<|end|>") -%}
    {{- "<|start|>" ~ header ~ "<|message|>" ~ plain(content) ~ stop -}}
{%- endmacro -%}

{#- What stands at the head, and where the last answer is. -#}
{%- set seen = namespace(head=[], count=0, answer=-1) -%}
{%- for each in messages -%}
    {%- if each.role in ["system", "developer"] and seen.count == loop.index0
    -%}
        {%- set seen.count = loop.index -%}
        {%- set text = said(each.content) -%}
        {%- set seen.head = seen.head + ([text] if text else []) -%}
    {%- elif each.role == "assistant" and not each.tool_calls
             and said(each.content) and each.phase != "commentary" -%}
        {%- set seen.answer = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}

{%- if date is not defined -%}
    {%- set date = strftime_now("%Y-%m-%d") -%}
{%- endif -%}
{%- set who = model_identity or
    "You are ChatGPT, a large language model trained by OpenAI." -%}
{%- set system = who ~ "\nKnowledge cutoff: 2024-06"
    ~ ("\nCurrent date: " ~ date if date else "")
    ~ "\n\nReasoning: " ~ (reasoning_effort or "medium")
    ~ "\n\n# Valid channels: analysis, commentary, final. "
    ~ "Channel must be included for every message."
    ~ ("\nCalls to these tools must go to the commentary channel: "
       ~ "'functions'." if tools else "") -%}
{{- message("system", system) -}}
{%- set told = ["# Instructions", seen.head | join("\n\n")]
    if seen.head else [] -%}
{%- set told = told + ([functions()] if tools else []) -%}
{{- message("developer", told | join("\n\n")) if told else "" -}}

{%- for each in messages[seen.count:] -%}
    {%- set at = loop.index0 + seen.count -%}
    {%- set name = ":" ~ plain(each.name) if each.name else "" -%}
    {%- set content = said(each.content) -%}
    {%- if each.role in ["system", "developer"] -%}
        {{- message("developer",
                    "# Instructions\n\n" ~ content if content else "") -}}
    {%- elif each.role == "user" -%}
        {{- message("user" ~ name, content) -}}
    {%- elif each.role == "assistant" -%}
        {%- set calls = each.tool_calls or [] -%}
        {%- set who = "assistant" ~ name -%}
        {%- set thought = each.reasoning or each.reasoning_content
            or each.thinking -%}
        {%- if thought and at > seen.answer -%}
            {{- message(who ~ "<|channel|>analysis", thought) -}}
        {%- endif -%}
        {%- if content -%}
            {%- set where = "commentary" if each.phase == "commentary"
                or (calls and not each.phase) else "final" -%}
            {{- message(who ~ "<|channel|>" ~ where, content) -}}
        {%- endif -%}
        {%- for call in calls -%}
            {%- set given = call.function.arguments -%}
            {{- message(who ~ " to=functions." ~ plain(call.function.name)
                ~ "<|channel|>commentary <|constrain|>json",
                given if given is string else given | tojson, "<|call|>") -}}
        {%- endfor -%}
        {#- The answers in the order of the calls. -#}
        {%- for call in calls -%}
            {%- set open = namespace(yes=true) -%}
            {%- for later in messages[at + 1:] -%}
                {%- if later.role != "tool" -%}
                    {%- set open.yes = false -%}
                {%- elif open.yes and later.tool_call_id == call.id -%}
                    {{- message("functions." ~ plain(call.function.name)
                        ~ " to=assistant<|channel|>commentary",
                        said(later.content)) -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endfor -%}
    {%- elif each.role != "tool" -%}
        {{- raise_exception("an unknown role: " ~ each.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- "<|start|>assistant" if add_generation_prompt else "" -}}
'''.lstrip()


__all__ = [
    "CHAT_TEMPLATE",
    "chat_prompt",
]
